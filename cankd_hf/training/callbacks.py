"""Callbacks of every run: the epoch for augmentation, the training time, and a graceful stop."""

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.data.common.views import SeededDataset

logger = logging.getLogger(__name__)


class EpochSetter(TrainerCallback):
    """Sets the epoch of the data set, so that each epoch has its own augmentation."""

    def __init__(self, dataset: SeededDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


class Stopwatch(TrainerCallback):
    """Measures the seconds of training, including those before an interruption, and adds them to the log history."""

    def __init__(self) -> None:
        self._start = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        before = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self._start = time.perf_counter() - (before[-1] if before else 0.0)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.log_history[-1]["train_seconds"] = round(self.seconds, 2)


class GracefulStopCallback(TrainerCallback):
    """On the first Ctrl-C (or SIGTERM), finishes the step, saves a checkpoint and stops. A second one stops at once.

    `stopped` is True afterwards if the run ended this way.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._previous: dict[int, Any] = {}

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            self._restore()
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("Stopping after this step and saving a checkpoint; once more to stop at once without one.")

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopped = self._asked = False
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._ask) for signum in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # All processes must stop at the same step; a reduction in every step would be slow.
        if args.world_size > 1:
            if state.global_step % max(1, int(state.logging_steps)):
                return
            flag = torch.tensor(float(self._asked), device=args.device)
            torch.distributed.all_reduce(flag)
            self._asked = bool(flag.item())
        if self._asked:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restore()
