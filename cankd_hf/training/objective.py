"""The objective that training minimises."""

from collections.abc import Sequence
from dataclasses import dataclass

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError


@dataclass(frozen=True)
class Objective:
    """`task_weight * task loss + sum over terms of weight * factor * distillation loss`.

    Args:
        task_weight: multiplier of the student's own loss, at least 0; 0 needs no labels.
        terms: the weighted distillation losses.
        frozen: paths of the student's modules that are not trained, such as `backbone`: no gradient, and eval mode,
            so that BatchNorm statistics do not change either.

    Raises:
        InputError: for a negative task weight, two terms of one name, or if there is no loss at all.
    """

    task_weight: float = 1.0
    terms: Sequence[LossTerm] = ()
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        for key, value in (("terms", self.terms), ("frozen", self.frozen)):
            if isinstance(value, str | LossTerm):
                raise InputError(f"{key}: expected a list, got {value!r}; write [{value!r}]")
        if not self.task_weight >= 0:
            raise InputError(f"task_weight: expected a number of at least 0, got {self.task_weight}")
        if self.task_weight == 0 and not self.terms:
            raise InputError("task_weight: 0 leaves nothing to train without a teacher and a term; give one of them")
        labels = [term.label for term in self.terms]
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            raise InputError(f"distill.terms: two terms are called {label!r}; give one of them another `name`")
        for term in self.terms:
            term.check()

    def factors(self, step: int, max_steps: int) -> list[float]:
        """Schedule factor of each term at a step, in [0, 1]; 0 for a term of weight 0.

        Args:
            step: optimizer steps already taken, from 0.
            max_steps: optimizer steps of the whole training.
        """
        return [term.factor(step, max_steps) if term.counts else 0.0 for term in self.terms]
