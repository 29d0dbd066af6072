"""What a recipe says about the distillation: its terms and their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cankd_hf.errors import InputError


@dataclass
class LossTerm:
    """One weighted loss of the objective: which loss, on which pairs of levels, how much and when.

    Args:
        loss: a name in `LOSSES`; in Python also a class or a module, such as `LossTerm(loss=MyLoss)`: see `Distiller`.
        teacher: name of the teacher it learns from; not needed where there is one.
        weight: multiplier of the unweighted loss, at least 0; a list gives one weight a pair. The paper's mu = 5 is
            weight 10: the authors' loss has the factor 0.5 inside, as ours has.
        pairs: "auto" (by stride) or a list of [student level, teacher level].
        warmup: length of the linear rise of the weight from 0 to 1 at the start; below 1 a fraction of the run's
            steps, else a number of steps.
        decay: length of the linear fall from 1 to 0 at the end, counted like `warmup`.
        options: keyword arguments of the loss.
        name: how the term is called in logs; the loss's name if None.
    """

    loss: str | Callable[..., Any] = "cankd"
    weight: float | list[float] = 10.0
    pairs: str | list[list[int]] = "auto"
    warmup: float = 0.0
    decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    teacher: str | None = None

    @property
    def label(self) -> str:
        """The name in logs."""
        return self.name or self.loss_name

    @property
    def loss_name(self) -> str:
        """The loss as text: its name in `LOSSES`, or the name of its class."""
        if isinstance(self.loss, str):
            return self.loss
        return self.loss.__name__ if isinstance(self.loss, type) else type(self.loss).__name__

    @property
    def structure(self) -> tuple[Any, ...]:
        """All that decides which modules the term has: not its weight and schedule."""
        return self.label, self.loss, repr(self.options), repr(self.pairs), self.teacher

    @property
    def counts(self) -> bool:
        """Whether any of its weights is above 0."""
        return any(self.weight) if isinstance(self.weight, list) else self.weight > 0

    def factor(self, step: int, max_steps: int) -> float:
        """Share of the weight in force at a step, in [0, 1].

        Args:
            step: optimizer steps already taken, from 0.
            max_steps: optimizer steps of the whole run.
        """
        rise = self.warmup * max_steps if self.warmup < 1 else self.warmup
        fall = self.decay * max_steps if self.decay < 1 else self.decay
        up = step / rise if rise > 0 else 1.0
        down = (max_steps - step) / fall if fall > 0 else 1.0
        return max(0.0, min(1.0, up, down))

    def weights(self, num_pairs: int) -> list[float]:
        """The weight of each of `num_pairs` pairs; InputError if a list of another length was given."""
        if not isinstance(self.weight, list):
            return [float(self.weight)] * num_pairs
        if len(self.weight) != num_pairs:
            raise InputError(
                f"terms.{self.label}.weight: expected {num_pairs} weights, one for each pair, got "
                f"{len(self.weight)}; give one number or {num_pairs}"
            )
        return [float(weight) for weight in self.weight]

    def check(self) -> None:
        """Raise one InputError with everything that is wrong with the term's values."""
        from cankd_hf.losses import LOSSES

        place, problems = f"terms.{self.label}", []
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            problems.append(
                f"{place}.loss: expected one of {', '.join(LOSSES)}, got {self.loss!r}; choose one of them"
            )
        given = self.weight if isinstance(self.weight, list) else [self.weight]
        if not given or not all(_is_number(weight) and 0 <= weight < float("inf") for weight in given):
            problems.append(
                f"{place}.weight: expected a number of at least 0, or one for each pair, got "
                f"{self.weight!r}; 10 is the paper's mu = 5"
            )
        for key in ("warmup", "decay"):
            value = getattr(self, key)
            if not (_is_number(value) and 0 <= value < float("inf")):
                problems.append(
                    f"{place}.{key}: expected a number of at least 0 (below 1 a fraction of the run, else "
                    f"steps), got {value!r}; 0 switches it off"
                )
        if not _is_pairs(self.pairs):
            problems.append(
                f"{place}.pairs: expected auto or a list of [student level, teacher level], got "
                f"{self.pairs!r}; for example [[0, 0], [1, 1]]"
            )
        if problems:
            raise InputError(problems)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pairs(value: object) -> bool:
    if not isinstance(value, list):
        return value == "auto"
    return bool(value) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(level) is int for level in pair)
        for pair in value
    )


GRIDS = ("finer", "coarser", "student", "teacher")


@dataclass
class DistillConfig:
    """The `distill:` section: what is compared, and how much it counts.

    Attributes:
        task_weight: multiplier of the student's own loss, at least 0; 0 trains without labels.
        terms: the feature losses; CanKD with the paper's weight unless said otherwise.
        grid: on whose grid two maps are compared: `finer` or `coarser` of the two, `student` or `teacher`.
    """

    task_weight: float = 1.0
    terms: list[LossTerm] = field(default_factory=lambda: [LossTerm()])
    grid: str = "finer"
