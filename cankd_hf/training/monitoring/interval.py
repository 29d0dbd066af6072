"""Between two log lines: means of the parts of the loss, how fast it went, and how long it waited for data."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainingArguments

if TYPE_CHECKING:
    from cankd_hf.training.distiller import Distiller

logger = logging.getLogger(__name__)

# Waiting longer than this share of the time, in so many intervals in a row, is worth a warning.
LONG_WAIT = 0.3
PATIENCE = 3


class PartMeans:
    """Means of what a `Distiller` measures, added up on the device: a step needs no synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Adds the `parts`, `similarity` [B, names] and `branch_share` of one forward, where they are in it."""
        for key in ("parts", "similarity", "branch_share"):
            if key not in outputs:
                continue
            value = outputs[key].mean(dim=0) if key == "similarity" else outputs[key]
            group = f"{key}{len(value)}"
            self._sums[group] = value if group not in self._sums else self._sums[group] + value
            self._counts[group] = self._counts.get(group, 0) + 1

    def drain(self, distiller: Distiller, accelerator: Accelerator) -> dict[str, float]:
        """Means over the interval, the accumulated batches and all processes, by name; starts anew."""
        logs: dict[str, float] = {}
        for group, total in self._sums.items():
            mean = accelerator.reduce(total / self._counts[group], "mean").tolist()
            if group.startswith("parts"):
                logs.update(_part_logs(distiller, mean))
            else:
                names = distiller.similarity_names if group.startswith("similarity") else distiller.branch_names
                prefix = "raw_" if group.startswith("similarity") else "branch_share/"
                logs.update({prefix + name: value for name, value in zip(names, mean, strict=True)})
        self._sums.clear()
        self._counts.clear()
        return logs


def _part_logs(distiller: Distiller, values: Sequence[float]) -> dict[str, float]:
    """`parts` under their names: the task loss, each term summed over its levels, and its levels where several."""
    logs: dict[str, float] = {}
    for name, value in zip(distiller.part_names, values, strict=False):
        term = name.split("/")[0]
        if term == "task":
            if distiller.task_weight > 0:
                logs["loss_task"] = value
            continue
        logs[f"loss_{term}"] = logs.get(f"loss_{term}", 0.0) + value
        if len(distiller.pairs[term]) > 1:
            logs[f"loss_{name}"] = value
    return logs


class BatchClock:
    """Times how long the process waits for batches. It reads the host's clock only.

    An interval begins with the first batch after a log line, so that evaluating and saving at a log line are no part
    of it. Waiting is told apart from computing where every step ends in a synchronisation: always on a CPU, and on a
    GPU with `logging_nan_inf_filter` (the default), which looks at each loss. Without it a GPU's work would be taken
    for waiting, as copying a batch to the device waits for that; then no share is given.

    Args:
        args: the training arguments.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self._tells_waiting = args.device.type == "cpu" or args.logging_nan_inf_filter
        self._begin: float | None = None
        self._asked = 0.0
        self._waited = 0.0
        self._images = 0
        self._intervals = self._slow = 0
        self._warned = False

    def ask(self) -> None:
        """The batches of a step are asked for."""
        self._asked = time.perf_counter()
        if self._begin is None:
            self._begin = self._asked

    def got(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """They are here."""
        self._waited += time.perf_counter() - self._asked
        self._images += sum(len(batch["pixel_values"]) for batch in batches)

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """`images_per_second` of all processes together and `data_wait`, 0 to 1, their mean; starts anew."""
        if self._begin is None:
            return {}
        seconds = time.perf_counter() - self._begin
        measured = torch.tensor([float(self._images), self._waited, seconds], device=accelerator.device)
        images, waited, seconds = accelerator.reduce(measured, "sum").tolist()
        self._begin, self._waited, self._images = None, 0.0, 0
        logs = {"images_per_second": round(images / (seconds / self.args.world_size), 2)}
        if self._tells_waiting:
            logs["data_wait"] = round(waited / seconds, 4)
            self._judge(logs["data_wait"])
        return logs

    def _judge(self, share: float) -> None:
        """Warns once, where it is not only the start that is slow."""
        self._intervals += 1
        self._slow = self._slow + 1 if share > LONG_WAIT and self._intervals > 1 else 0
        if self._slow < PATIENCE or self._warned:
            return
        self._warned = True
        if self.args.process_index != 0:
            return
        with tqdm.external_write_mode(sys.stderr):  # on a line of its own, not behind the bar
            logger.warning(
                "data: the training waits %.0f%% of the time for images; try more training.dataloader_num_workers "
                "(now %d, this machine has %d cores); where images are decoded anew each time and fit into memory, "
                "set data.cache: true",
                100 * share,
                self.args.dataloader_num_workers,
                os.cpu_count() or 1,
            )
