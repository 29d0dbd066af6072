"""The evaluation methods of `CanKDTrainer`: statistics of each image instead of logits."""

from typing import Any

import torch
from torch import nn

from cankd_hf.data.common.batch import Batch
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.finite import StepGuard


class EvaluationMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` in evaluation."""

    guard: StepGuard

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Returns statistics of each image instead of logits, so that evaluation does not keep logits in memory."""
        batch = Batch(self._prepare_inputs(inputs))
        kept = self.task.model_inputs(batch.inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.task.needs_teacher_in_evaluation:
                kept.update(self._ask_teachers(batch, [1.0] * len(self.distiller.objective.terms), True))
            outputs = model(**kept)
        self.guard.see_answers(outputs)
        loss = None if outputs.loss is None else outputs.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        with torch.no_grad():
            statistics = self.task.statistics(outputs, batch.inputs, self.student)
        # The Trainer computes metrics only if there are labels; the statistics already include them.
        return loss, statistics, torch.zeros(len(batch["pixel_values"]), device=self.args.device)
