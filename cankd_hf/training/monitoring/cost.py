"""What a training really spent: CPU seconds with all loading processes, and seconds of the device or by the clock."""

import os
import time
from contextlib import suppress
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

CPU, DEVICE, WALL = "cpu_seconds", "device_seconds", "wall_seconds"
SETUP = "_to_first_step"  # the part of each that is spent once: models, first batch, first step
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
    """

    def __init__(self) -> None:
        self._by_clock = DEVICE if torch.accelerator.is_available() else WALL
        self._free: dict[str, float] = {}  # what the clocks showed that is not to be charged
        self._start = self._clocks()
        self._setup: dict[str, float] = {}
        self._mark: dict[str, float] | None = None  # since an evaluation began
        self._end: dict[str, float] | None = None

    @property
    def cost(self) -> dict[str, float]:
        """Seconds by name, and under NAME_to_first_step the part of them until the end of the first step."""
        return {name: round(value, 3) for name, value in {**self._spent(), **self._setup}.items()}

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
            if f"{_LOGGED}{name}" in before:
                self._free[name] = self._clocks()[name] - self._start[name] - before[f"{_LOGGED}{name}"]
            if f"{_LOGGED}{name}{SETUP}" in before:
                self._setup[f"{name}{SETUP}"] = before[f"{_LOGGED}{name}{SETUP}"]
        if args.eval_on_start:
            self._mark = self._clocks()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 1:
            self._setup = {f"{name}{SETUP}": spent for name, spent in self._spent().items()}
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
