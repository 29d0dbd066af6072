"""Stored teachers while a run goes on: answers are written, those that others paid are charged, misses explained."""

import logging
import time
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.training.caching import CachingMixin
from cankd_hf.training.monitoring.cost import CostMeter

logger = logging.getLogger(__name__)

MANY, LEAST = 0.2, 32  # share of pictures without an answer, and their number, that is told when all views were seen
_FILES, _CHARGED = "teacher_cache_files", "teacher_cache_seconds"  # in the log history
_KEY = 6  # letters of the name of a store, by which it is charged


class CacheCallback(TrainerCallback):
    """Writes answers at the end of each epoch, charges those that others paid, and says why pictures have none.

    Args:
        trainer: a `CanKDTrainer`; the caller adds the callback to it.
    """

    def __init__(self, trainer: CachingMixin) -> None:
        self.trainer = trainer
        self._before: dict[str, dict[str, float]] = {}  # what was charged before an interruption, by store
        self._told = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        last: dict[str, Any] = cast(Any, state.log_history[-1]) if state.log_history else {}
        self.trainer.paid_files, self._before = dict(last.get(_FILES, {})), dict(last.get(_CHARGED, {}))
        if any(
            not isinstance(one, dict) for one in self._before.values()
        ):  # of an earlier version: all stores together
            self._before = {"": cast(Any, self._before)}
        for one in self.trainer.stored.values():
            one.old = False

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for one in self.trainer.stored.values():
            one.old = int(state.epoch or 0) >= self.trainer.epochs_of_views

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for one in self.trainer.stored.values():
            one.store.flush()
        self._tell()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for one in self.trainer.stored.values():
            one.store.flush()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stores = [one.store for one in self.trainer.stored.values()]
        charged = {key: dict(clocks) for key, clocks in self._before.items()}
        for store in stores:
            of, spent = charged.setdefault(store.folder.name[:_KEY], {}), store.spent()
            for clock, seconds in store.charged().items():
                of[clock] = min(of.get(clock, 0.0) + seconds, spent.get(clock, seconds))
        files = {**self.trainer.paid_files, **{store.writer: store.written for store in stores if store.written}}
        if stores:
            cast(Any, state.log_history[-1]).update({_FILES: files, _CHARGED: charged})
        meters = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, CostMeter)]
        for key, clocks in charged.items():
            for meter in meters if any(clocks.values()) else ():
                name = f"teacher cache {key}".strip()
                told = meter.prepaid.get(name, {})  # by an earlier phase that read the same store
                meter.prepay(name, {clock: max(now, told.get(clock, 0.0)) for clock, now in clocks.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_epoch_end(args, state, control)
        if state.log_history:
            self.on_log(args, state, control)
        for one in self.trainer.stored.values():
            one.store.note_use({**one.found.facts(), "run": args.output_dir, "when": time.time()})

    def _tell(self) -> None:
        """Says once, where many pictures had no answer after all views were seen, why."""
        for name, one in self.trainer.stored.items():
            unknown = sum(one.found.reasons.values())
            if self._told or unknown < LEAST or unknown < MANY * (one.found.hits + one.found.misses) / 2:
                continue
            self._told = True
            reasons = "; ".join(f"{count}: {reason}" for reason, count in one.found.reasons.most_common())
            logger.warning(
                "teacher cache of %s: %d pictures had no stored answer, and were computed live. %s",
                name,
                unknown,
                reasons,
            )
