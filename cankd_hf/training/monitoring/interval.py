"""Between two log lines: means of the parts of the loss, how fast it went, and how long it waited for data."""

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

# What a `Distiller` measures -> how its names begin in the logs.
PREFIXES = {"parts": "loss_", "similarity": "raw_", "branch_share": "branch_share/"}

# Waiting longer than this share of the time, in so many intervals in a row, is worth a warning.
LONG_WAIT = 0.3
PATIENCE = 3


class PartMeans:
    """Means of what a `Distiller` measures, added up on the device: a step needs no synchronisation."""

    def __init__(self) -> None:
        # (what, names) -> sum [names] and how many forwards it is of
        self._sums: dict[tuple[str, tuple[str, ...]], tuple[Tensor, int]] = {}

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Adds the `parts`, `similarity` and `branch_share` of one forward, where they are in it."""
        for kind in PREFIXES:
            values: Mapping[str, Tensor] = outputs.get(kind) or {}
            if not values:
                continue
            stacked = torch.stack(list(values.values()), dim=-1)
            if kind == "similarity":  # [B, names]
                stacked = stacked.mean(dim=0)
            key = kind, tuple(values)
            total, count = self._sums.get(key, (None, 0))
            self._sums[key] = stacked if total is None else total + stacked, count + 1

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the interval, the accumulated batches and all processes, by name; starts anew."""
        logs: dict[str, float] = {}
        for (kind, names), (total, count) in self._sums.items():
            means = dict(zip(names, accelerator.reduce(total / count, "mean").tolist(), strict=True))
            if kind == "parts":
                means = _with_totals(means)
            logs.update({PREFIXES[kind] + name: value for name, value in means.items()})
        self._sums.clear()
        return logs


def _with_totals(parts: Mapping[str, float]) -> dict[str, float]:
    """Each term summed over its levels, and its levels where it has several: `cankd`, `cankd/s0t0`, `cankd/s1t1`."""
    terms = [name.split("/")[0] for name in parts]
    found: dict[str, float] = {}
    for term, (name, value) in zip(terms, parts.items(), strict=True):
        found[term] = found.get(term, 0.0) + value
        if terms.count(term) > 1:
            found[name] = value
    return found


class BatchClock:
    """Times how long the process waits for batches. It reads the host's clock only.

    An interval begins with the first batch after a log line, so that evaluating and saving at a log line are no part
    of it. Waiting differs from computing where every step ends in a synchronisation: always on a CPU, and on a
    GPU with `logging_nan_inf_filter` (the default), which looks at each loss. Without it a GPU's work would be taken
    for waiting, as copying a batch to the device waits for that; then no share is given.
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
