"""Measurements between two log lines: means of the parts of the loss, images per second, time waiting for data."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainingArguments

from cankd_hf.training.monitoring.waiting import what_helps

logger = logging.getLogger(__name__)

# Field of `DistillerOutput` -> prefix of its names in the logs.
PREFIXES = {"parts": "loss_", "similarity": "raw_", "branch_share": "branch_share/", "reports": ""}

# Waiting longer than this share of the time, in PATIENCE intervals in a row, gives a warning.
LONG_WAIT = 0.3
PATIENCE = 3


class PartMeans:
    """Means of the measurements of a `Distiller`, summed on the device: no synchronisation per step."""

    def __init__(self) -> None:
        # (field, names) -> sums of the finite values and their numbers, [2, names]
        self._sums: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Adds the `parts`, `similarity`, `branch_share` and `reports` of one forward pass, if present and finite."""
        for kind in PREFIXES:
            values: Mapping[str, Tensor] = outputs.get(kind) or {}
            if not values:
                continue
            stacked = torch.stack(list(values.values()), dim=-1).float()
            if kind == "similarity":  # [B, names]
                stacked = stacked.mean(dim=0)
            finite = torch.isfinite(stacked)
            added = torch.stack([torch.where(finite, stacked, torch.zeros_like(stacked)), finite.float()])
            key = kind, tuple(values)
            self._sums[key] = self._sums[key] + added if key in self._sums else added

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the interval, the accumulated batches and all processes, by name; then resets them.

        A name without one finite value in the interval is left out.
        """
        found: dict[str, dict[str, Tensor]] = {}  # steps without a teacher have fewer names
        for (kind, names), sums in self._sums.items():
            known = found.setdefault(kind, {})
            for name, own in zip(names, accelerator.reduce(sums, "sum").cpu().double().T, strict=True):
                known[name] = known[name] + own if name in known else own
        self._sums.clear()
        logs: dict[str, float] = {}
        for kind, known in found.items():
            means = {name: float(total / n) for name, (total, n) in known.items() if n}
            means = _with_totals(means) if kind == "parts" else means
            logs.update({PREFIXES[kind] + name: value for name, value in means.items()})
        return logs


def _with_totals(parts: Mapping[str, float]) -> dict[str, float]:
    """The sum over the pairs of each term, and each pair if there are several: `cankd`, `cankd/s0t0`, `cankd/s1t1`."""
    terms = [name.split("/")[0] for name in parts]
    found: dict[str, float] = {}
    for term, (name, value) in zip(terms, parts.items(), strict=True):
        found[term] = found.get(term, 0.0) + value
        if terms.count(term) > 1:
            found[name] = value
    return found


class BatchClock:
    """Measures how long the device waits for batches.

    An interval begins with the first batch after a log line, so that evaluating and saving there are not counted.
    On a CPU the host's clock tells. On CUDA, where the host runs ahead, two events do: one when the device is done
    with the step before, one when it gets the batch; they are read once they have passed. Other devices have no share
    in the logs.
    """

    def __init__(self, args: TrainingArguments, dataset: Any = None) -> None:
        self.args, self.dataset = args, dataset
        self._measures_waiting = args.device.type in ("cpu", "cuda")
        self._events: list[torch.cuda.Event] = []  # before and after each request
        self._begin: float | None = None
        self._asked = 0.0
        self._waited = 0.0
        self._images = 0
        self._intervals = self._slow = 0
        self._warned = False

    def ask(self) -> None:
        """Called before the batches of a step are requested."""
        self._asked = time.perf_counter()
        self._mark()
        if self._begin is None:
            self._begin = self._asked

    def got(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Called when these batches have arrived."""
        if not self._mark():
            self._waited += time.perf_counter() - self._asked
        self._images += sum(len(batch["pixel_values"]) for batch in batches)

    def _mark(self) -> bool:
        """Records an event where the device has them."""
        if self.args.device.type != "cuda":
            return False
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()
        self._pass()
        return True

    def _pass(self) -> None:
        """Adds the waiting between the pairs of events that have passed."""
        while len(self._events) > 1 and self._events[1].query():
            before, after = self._events[:2]
            self._waited += before.elapsed_time(after) / 1000
            del self._events[:2]

    def drain(self, accelerator: Accelerator) -> dict[str, float]:
        """`images_per_second` of all processes and their mean `data_wait`, 0 to 1; then resets both."""
        if self._begin is None:
            return {}
        seconds = time.perf_counter() - self._begin
        if self._events:
            self._events[-1].synchronize()
            self._pass()
        measured = torch.tensor([float(self._images), self._waited, seconds], device=accelerator.device)
        images, waited, seconds = accelerator.reduce(measured, "sum").tolist()
        self._begin, self._waited, self._images = None, 0.0, 0
        logs = {"images_per_second": round(images / (seconds / self.args.world_size), 2)}
        if self._measures_waiting:
            logs["data_wait"] = round(waited / seconds, 4)
            self._judge(logs["data_wait"])
        return logs

    def _judge(self, share: float) -> None:
        """Warns once if waiting persists after the first interval."""
        self._intervals += 1
        self._slow = self._slow + 1 if share > LONG_WAIT and self._intervals > 1 else 0
        if self._slow < PATIENCE or self._warned:
            return
        self._warned = True
        if self.args.process_index != 0:
            return
        with tqdm.external_write_mode(sys.stderr):  # on a line of its own, not behind the bar
            helps = what_helps(self.args, self.dataset)
            logger.warning("data: the training waits %.0f%% of the time for images; %s", 100 * share, helps)
