"""The objective that training minimises."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cankd_hf.config.distill import Guard, LossTerm, Share
from cankd_hf.errors import InputError


@dataclass(frozen=True)
class Objective:
    """`task_weight * task loss + sum over terms of weight * factor * distillation loss`.

    Args:
        task_weight: multiplier of the student's own loss, at least 0; 0 needs no labels.
        terms: the weighted distillation losses.
        frozen: paths of the student's modules that are not trained, such as `backbone`: no gradient, and eval mode,
            so that BatchNorm statistics do not change either.
        guard: when a term that fights the task is turned down; None for never, and nothing is measured.

    Raises:
        InputError: for a negative task weight, two terms of one name, or if there is no loss at all.
    """

    task_weight: float = 1.0
    terms: Sequence[LossTerm] = ()
    frozen: Sequence[str] = ()
    guard: Guard | None = None

    def __post_init__(self) -> None:
        for key, value, kind in (("terms", self.terms, LossTerm), ("frozen", self.frozen, str)):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise InputError(f"{key}: expected a list, got {value!r}; write [{value!r}]")
            if wrong := [item for item in value if not isinstance(item, kind)]:
                raise InputError(f"{key}: expected a list of {kind.__name__}, got {wrong[0]!r} in it")
        if not (isinstance(self.task_weight, int | float) and 0 <= self.task_weight < math.inf):
            raise InputError(f"task_weight: expected a finite number of at least 0, got {self.task_weight!r}")
        if self.task_weight == 0 and not self.terms:
            raise InputError("task_weight: 0 leaves nothing to train without a teacher and a term; give one of them")
        count = [term for term in self.terms if term.counts]
        if self.task_weight == 0 and count and all(term.fade is not None and term.fade[1] < 1 for term in count):
            raise InputError("distill.terms: with task_weight 0 nothing is left to learn once all terms have faded")
        labels = [term.label for term in self.terms]
        for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
            raise InputError(f"distill.terms: two terms are called {label!r}; give one of them another `name`")
        for term in self.terms:
            term.check()
        if self.guard is not None:
            self.guard.raise_problems()
        if sum(term.loss_name in ("pseudo_boxes", "PseudoBoxesLoss") for term in self.terms) > 1:
            raise InputError("distill.terms: expected one term pseudo_boxes, got several; choose one teacher for it")
        shares = sum(term.weight.share for term in self.terms if isinstance(term.weight, Share))
        if shares >= 1:
            raise InputError(f"distill.terms: the shares add up to {shares:g}; leave some gradient to the others")
        if shares and not self.task_weight and all(isinstance(t.weight, Share) or not t.counts for t in self.terms):
            raise InputError("distill.terms: a share of nothing else is all; give one term a number as weight")

    def factors(self, step: int, max_steps: int) -> list[float]:
        """Schedule factor of each term at a step, in [0, 1]; 0 for a term of weight 0.

        Args:
            step: optimizer steps already taken, from 0.
            max_steps: optimizer steps of the whole training.
        """
        return [term.factor(step, max_steps) if term.counts else 0.0 for term in self.terms]

    def taught(self, max_steps: int) -> int:
        """Number of optimizer steps after which no term counts any more, and no teacher is asked."""
        return max((term.taught(max_steps) for term in self.terms), default=0)
