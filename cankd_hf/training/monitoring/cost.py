"""What a training really spent: CPU seconds with all loading processes, and seconds of the device or by the clock."""

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.errors import InputError

CPU, DEVICE, WALL = "cpu_seconds", "device_seconds", "wall_seconds"
SETUP = "_to_first_step"  # the part of each that is spent once: models, first batch, first step
PREPAID = "_prepaid"  # the part of each that was spent before: stored teachers, pseudo-labels, earlier phases
_LOGGED = "train_"  # the entries of the log history


def cpu_seconds() -> float:
    """CPU time, user + system, of this process and of all processes that it started, ended or not."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended at this moment: it is among the children above from now on
            times = child.cpu_times()
            total += times.user + times.system
            total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


class CostMeter(TrainerCallback):
    """Measures a training from the making of its models on, without its evaluations, and logs it with each entry.

    Beside CPU seconds it has those by the clock; on an accelerator, whose queue is waited for, they are the seconds
    for which it was held. Teachers, losses, statistics, loading processes and checkpoints are all in them. A resumed
    training continues from its last log entry, so that its cost is that of one that was never interrupted.

    What was spent before, for stored teachers, pseudo-labels or earlier phases, is charged in full (`prepay`).

    Attributes:
        prepaid: what was spent before, by what it was spent on, in seconds by name of the clock.
    """

    def __init__(self) -> None:
        self._by_clock = DEVICE if torch.accelerator.is_available() else WALL
        self.prepaid: dict[str, dict[str, float]] = {}
        self._free: dict[str, float] = {}  # what the clocks showed that is not to be charged
        self._start = self._clocks()
        self._setup: dict[str, float] = {}
        self._mark: dict[str, float] | None = None  # since an evaluation began
        self._end: dict[str, float] | None = None

    @property
    def cost(self) -> dict[str, float]:
        """Seconds by name, and under NAME_to_first_step the part of them until the end of the first step.

        Both have what was prepaid in them; where there is any, it stands once more under NAME_prepaid.
        """
        before = self._before()
        found = {name: spent + before[name] for name, spent in self._spent().items()}
        found |= {f"{name}{SETUP}": spent + before[name] for name, spent in self._setup.items()}
        if self.prepaid:
            found |= {f"{name}{PREPAID}": spent for name, spent in before.items()}
        return {name: round(value, 3) for name, value in found.items()}

    def prepay(self, name: str, seconds: Mapping[str, float] | float) -> None:
        """Charges what was spent before this training, in full.

        Args:
            name: of what it was spent on; each name is charged once, with what was told last.
            seconds: by name of the clock; seconds of a device and by the clock stand in for each other where the other
                machine had none, and for those of the CPU where these were not measured. A number is taken for all.

        Raises:
            InputError: for seconds of no clock, or that are no finite numbers of at least 0.
        """
        given = dict(seconds) if isinstance(seconds, Mapping) else dict.fromkeys((CPU, DEVICE, WALL), seconds)
        given = {clock: given[clock] for clock in (CPU, DEVICE, WALL) if clock in given}
        wrong = [value for value in given.values() if not (isinstance(value, int | float) and 0 <= value < math.inf)]
        if wrong or not given:
            expected = f"expected seconds of at least 0 by {CPU}, {DEVICE} or {WALL}"
            raise InputError(f"cost of {name}: {expected}, got {seconds!r}; it was not written by this package")
        self.prepaid[name] = {clock: float(value) for clock, value in given.items()}

    def _before(self) -> dict[str, float]:
        """What was prepaid, by this machine's clocks."""
        other = {CPU: (WALL, DEVICE), WALL: (DEVICE, CPU), DEVICE: (WALL, CPU)}
        return {
            name: sum(next(one[n] for n in (name, *other[name]) if n in one) for one in self.prepaid.values())
            for name in self._start
        }

    def _clocks(self) -> dict[str, float]:
        if self._by_clock == DEVICE:
            torch.accelerator.synchronize()
        return {CPU: cpu_seconds(), self._by_clock: time.perf_counter()}

    def _spent(self) -> dict[str, float]:
        now = self._end or self._mark or self._clocks()
        return {name: now[name] - start - self._free.get(name, 0.0) for name, start in self._start.items()}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.device.type == "cpu" and self._by_clock == DEVICE:
            self._by_clock, self._start = WALL, {CPU: self._start[CPU], WALL: self._start[DEVICE]}
        before = state.log_history[-1] if state.log_history else {}
        for name in self._start:
            paid = before.get(f"{_LOGGED}{name}{PREPAID}", 0.0)
            if f"{_LOGGED}{name}" in before:
                self._free[name] = self._clocks()[name] - self._start[name] - before[f"{_LOGGED}{name}"] + paid
            if f"{_LOGGED}{name}{SETUP}" in before:
                self._setup[name] = before[f"{_LOGGED}{name}{SETUP}"] - paid
        if args.eval_on_start:
            self._mark = self._clocks()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 1:
            self._setup = self._spent()
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_evaluate and self._mark is None:
            self._mark = self._clocks()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._mark is None or self._end is not None:
            return
        for name, now in self._clocks().items():
            self._free[name] = self._free.get(name, 0.0) + now - self._mark[name]
        self._mark = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, value in self.cost.items():
            state.log_history[-1][f"{_LOGGED}{name}"] = value

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark, self._end = None, self._clocks()
