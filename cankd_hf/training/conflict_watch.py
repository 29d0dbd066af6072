"""What a run does beside its steps to watch the conflict of task and terms: held-out images, and what is said."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.config.distill import Guard
from cankd_hf.data.common.batch import Batch
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.seeds import derived_seed, seeded
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.common.views import is_stream
from cankd_hf.errors import InputError
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.conflict import told
from cankd_hf.training.working import watched

logger = logging.getLogger(__name__)


class ConflictCallback(TrainerCallback):
    """Measures the conflict on held-out images, where some are, and says when a term was turned down or up.

    A measurement takes one batch, of training size, through student and teacher, in turn through all held-out images.
    It is part of the training, and charged. Nothing of it is learned: modes, BatchNorm statistics and random state
    stay as they were.
    """

    def __init__(self, trainer: TeachingTrainer) -> None:
        self.trainer = trainer
        self._said: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._said = self._factors()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        held = self.trainer.held_out
        if held is not None and self.trainer.distiller.conflict.due(state.global_step):
            self._measure(held, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        factors = self._factors()
        for label, factor in factors.items() if state.is_world_process_zero else ():
            if (before := self._said.get(label, 1.0)) != factor:
                logger.warning("step %d: %s", state.global_step, _change(label, before, factor))
        self._said = factors

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        says = state.is_world_process_zero and cast(Any, self.trainer).working.says_the_end
        if says and (line := told(state.log_history)):
            logger.warning("Weights: %s", line)

    def _factors(self) -> dict[str, float]:
        logged = self.trainer.distiller.conflict.logged()
        return {key.partition("/")[2]: value for key, value in logged.items() if key.startswith("turned_down/")}

    def _measure(self, held: Dataset[Any], step: int) -> None:
        trainer: Any = self.trainer
        factors = trainer.distiller.objective.factors(step, trainer.state.max_steps)
        size, world = trainer.args.per_device_train_batch_size, trainer.args.world_size
        with ExitStack() as stack:
            stack.enter_context(seeded(derived_seed(trainer.args.seed, "held out", step) % 2**32))
            stack.enter_context(watched(trainer.distiller))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(trainer.compute_loss_context_manager())
            count = len(cast(Any, held))
            first = (step // 10 * world + trainer.args.process_index) * size  # each process takes a batch of its own
            samples = [held[(first + offset) % count] for offset in range(min(size, count))]
            batch = Batch(trainer._prepare_inputs(trainer.data_collator(samples)))
            given = trainer._ask_teachers(batch, factors, False)
            if given:
                trainer.distiller(**batch.inputs, **given, keep=False, watch="held")


def _change(label: str, before: float, factor: float) -> str:
    if factor < before:
        return f"{label} fights the task, by the angle of their gradients: turned down to {factor:.3g} of its weight"
    return f"{label} agrees with the task again: turned up to {factor:.3g} of its weight"


def hold_out(dataset: Any, guard: Guard | None, seed: int) -> tuple[Any, Any]:
    """A training set without the images that a guard holds out, and these, a random part by the seed; else None.

    Raises:
        InputError: for a stream, or a set of fewer than two images.
    """
    part = 0.0 if guard is None else guard.holdout
    if not part or dataset is None:
        return dataset, None
    if isinstance(dataset, WithUnlabelled):
        kept, held = hold_out(dataset.labelled, guard, seed)
        return WithUnlabelled(kept, dataset.unlabelled, dataset.ratio), held
    if is_stream(dataset) or not hasattr(dataset, "__getitem__"):
        raise InputError("distill.guard.holdout: a stream cannot be cut in two; set it to 0")
    count = len(dataset)
    if count < 2:
        raise InputError(f"distill.guard.holdout: expected at least 2 training images, got {count}; set it to 0")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(max(round(part * count), 1), count - 1)
    return _part(dataset, sorted(order[cut:])), _part(dataset, sorted(order[:cut]))


def _part(dataset: Any, indices: Sequence[int]) -> Any:
    """The data set with these images alone."""
    return dataset.part(indices) if isinstance(dataset, ImageDataset) else Subset(dataset, indices)
