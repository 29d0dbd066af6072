"""Callbacks of every run: the epoch for augmentation, the training time, and a graceful stop."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    Signals are handled inside `listening` alone. `stopped` is True afterwards if the run ended this way.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = 0  # number of the signal
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals inside the context, and restores the former handlers on every way out of it."""
        self.stopped, self._asked = False, 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._ask) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._restore()

    def leave(self) -> None:
        """Ends the program as the signal would have, if training was stopped by one.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: with code 143, after SIGTERM.
        """
        if self.stopped and self._asked == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        if self.stopped:
            raise KeyboardInterrupt

    def ask(self, signum: int) -> None:
        """Asks for the stop in the place of a signal."""
        self._asked = signum

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self._asked:
            self._restore()
            if signum == signal.SIGTERM:
                raise SystemExit(128 + signum)
            raise KeyboardInterrupt
        self._asked = signum
        logger.warning("Stopping after this step and saving a checkpoint; once more to stop at once without one.")

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # All processes must stop at the same step; a reduction in every step would be slow.
        if args.world_size > 1 and state.global_step % max(1, int(state.logging_steps)):
            return
        if self.agreed(args):
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def agreed(self, args: TrainingArguments) -> bool:
        """Whether any process was asked to stop; called by all of them at once."""
        if args.world_size > 1:
            flag = torch.tensor(self._asked, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self._asked = int(flag.item())
        return bool(self._asked)
