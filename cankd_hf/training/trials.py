"""Students that are made anew for each training: `model_init` and hyperparameter search."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, enable_full_determinism, set_seed

from cankd_hf.data.common.seeds import seeded
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.evaluation import TaskScores
from cankd_hf.training.objective import Objective
from cankd_hf.training.setup import as_asked


class TrialsMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for `model_init`."""

    _objective: Objective
    _distiller_parts: tuple[Any, ...]  # teachers' shapes, image size, taps and grid of the `Distiller`

    def first_student(self, model_init: Callable[..., Any]) -> Any:
        """The student of `model_init` before any trial, with the weights that the first training starts from."""
        self.model_init = model_init
        enable_full_determinism(self.args.seed) if self.args.full_determinism else set_seed(self.args.seed)
        return super().call_model_init()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new student from `model_init`; connectors and losses start from the seed, as in the first training."""
        student: Any = super().call_model_init(trial)
        self.task = self.task.for_model(student)
        if isinstance(self.compute_metrics, TaskScores):
            self.compute_metrics.task = self.task
        return self.build_distiller(student)

    def build_distiller(self, student: PreTrainedModel) -> Distiller:
        """The student with new connectors and losses, the same ones whatever random numbers were drawn before."""
        with seeded(self.args.seed):
            made = as_asked(Distiller(student, self._objective, *self._distiller_parts), self.args)
        made.counted_labels = self.task.counted_labels
        return made

    def hyperparameter_search(
        self,
        hp_space: Callable[..., Any] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As in `transformers.Trainer`: minimises the evaluation loss unless `compute_objective` says otherwise.

        The Trainer would minimise the sum of all scores instead, which here is there without a `compute_metrics`.
        """
        if compute_objective is None and isinstance(self.compute_metrics, TaskScores):
            compute_objective = evaluation_loss
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)


def evaluation_loss(metrics: dict[str, float]) -> float:
    """The default objective of a search."""
    return metrics["eval_loss"]
