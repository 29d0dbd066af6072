"""The `distill:` section of a recipe: terms and their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Ge, Gt, Le, Len, Lt

from cankd_hf.config import declared
from cankd_hf.config.advice import Say, not_one_of
from cankd_hf.config.schema import Section
from cankd_hf.errors import InputError

Grid = Literal["finer", "coarser", "student", "teacher"]
# How a teacher's map is conditioned before a loss compares it: see `losses/targets.py`.
Conditioning = Literal["none", "layer", "l2", "channel", "global", "phi_s", "clip"]
GRIDS: tuple[str, ...] = get_args(Grid)
Weight = Annotated[float, Ge(0), Say(fix="10 is the paper's mu = 5")]
Length = Annotated[float, Ge(0), Say(fix="below 1 it is a fraction of the run, else steps; 0 switches it off")]
Pair = Annotated[
    list[Annotated[int, Ge(-100), Le(100)]],
    Len(2, 2),
    Say("[student level, teacher level]", fix="for example [-1, -1]"),
]
# Options of losses whose values are the keys of a dictionary: its module and its name.
_NAMED = {"affinity": ("cankd_hf.losses.affinities", "AFFINITIES")}

REGISTRIES = ("LOSSES", "OWN_LOSSES")


@dataclass
class Share(Section):
    """A weight that is set, and set again, so that the loss has this share of the gradient at its taps.

    Args:
        share: above 0 and below 1; the rest is for the losses with a number as weight.
    """

    place: ClassVar[str] = "distill.terms.0.weight"

    share: Annotated[float, Gt(0), Lt(1), Say(fix="0.1 is a tenth of the gradient")]


@dataclass
class LossTerm(Section):
    """One weighted loss of the objective: the loss, its pairs of levels, its weight and schedule.

    Args:
        loss: a name in `LOSSES`, or `pseudo_boxes` (docs/unlabelled.md); in Python also a class or a module, such as
            `LossTerm(loss=MyLoss)`: see `Distiller`.
        teacher: name of its teacher; not needed if there is only one.
        weight: multiplier of the unweighted loss, at least 0; a list has one weight for each pair. The paper's mu = 5
            is weight 10, because the loss includes the factor 0.5, as the authors' code does. `{share: 0.1}` sets
            it so that the term has a tenth of the gradient at the student's taps.
        pairs: "auto" (by stride) or a list of [student level, teacher level]; negative levels count from the end.
        warmup: length of the linear rise of the weight from 0 to 1 at the start; below 1 a fraction of the run's
            steps, else a number of steps.
        decay: length of the linear fall from 1 to 0 at the end, counted like `warmup`.
        conditioning: what is done to the teacher's maps first: `none`; `layer`, each cell with mean 0 and variance 1
            over its channels; `l2`, each cell with length 1; `channel`, each channel standardised; `global`, one
            mean and deviation for all values; `phi_s`, rotated to channels of variance 1 (PHI-S); `clip`, outlier
            cells cut to the length where these begin. Statistics are measured on the first
            `training.conditioning_batches` batches, then frozen.
        options: keyword arguments of the loss.
        name: name of the term in logs; by default that of the loss.
    """

    place: ClassVar[str] = "distill.terms.0"

    loss: str | Callable[..., Any] = "cankd"
    weight: Weight | Annotated[list[Weight], Len(1), Say(fix="one number for all pairs, or one for each")] | Share = (
        10.0
    )
    pairs: Literal["auto"] | Annotated[list[Pair], Len(1), Say(fix="write auto, or at least one pair")] = "auto"
    warmup: Length = 0.0
    decay: Length = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    teacher: str | None = None
    conditioning: Conditioning = "none"

    def __post_init__(self) -> None:
        weight: Any = self.weight
        if isinstance(weight, dict) and weight.keys() == {"share"}:  # as in a recipe
            self.weight = Share(**weight)

    @property
    def label(self) -> str:
        """The name in logs."""
        return self.name or self.loss_name

    @property
    def loss_name(self) -> str:
        """Name of the loss: in `LOSSES`, or of its class."""
        if isinstance(self.loss, str):
            return self.loss
        return self.loss.__name__ if isinstance(self.loss, type) else type(self.loss).__name__

    @property
    def structure(self) -> tuple[Any, ...]:
        """The fields that determine the modules of the term, that is all but weight and schedule."""
        return self.label, self.loss, repr(self.options), repr(self.pairs), self.teacher, self.conditioning

    @property
    def counts(self) -> bool:
        """Whether any of its weights is above 0."""
        if isinstance(self.weight, Share):
            return True
        return any(self.weight) if isinstance(self.weight, list) else self.weight > 0

    def factor(self, step: int, max_steps: int) -> float:
        """Schedule factor of the weight at a step, in [0, 1].

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
        """The weight of each of `num_pairs` pairs; InputError if `weight` is a list of another length. 1 for a share,
        which is a weight of the sum over the pairs."""
        if isinstance(self.weight, Share):
            return [1.0] * num_pairs
        if not isinstance(self.weight, list):
            return [float(self.weight)] * num_pairs
        if len(self.weight) != num_pairs:
            raise InputError(
                f"distill.terms.{self.label}.weight: expected {num_pairs} weights, one for each pair, got "
                f"{len(self.weight)}; give one number or {num_pairs}"
            )
        return [float(weight) for weight in self.weight]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges: an unknown loss, a name that the logs or torch use otherwise."""
        if "." in self.label or self.label == "task":
            yield "name", f"expected a name other than `task`, without dots, got {self.label!r}; rename the term"
        if isinstance(self.loss, str) and self._registry() is None:
            yield "loss", not_one_of(self.loss, declared.names("cankd_hf.losses", "LOSSES"))

    def accepted(self) -> dict[str, dict[str, Any]]:
        """Names and types of the `options` of a loss that is given by name."""
        registry = self._registry()
        if not isinstance(self.loss, str) or registry is None:
            return {}
        found = declared.entry_parameters("cankd_hf.losses", registry, self.loss)
        for key, place in _NAMED.items():
            if key in found and (names := declared.names(*place)):
                found = {**found, key: Literal[tuple(names)]}
        return {"options": {key: kind for key, kind in found.items() if key not in ("channels", "num_labels")}}

    def _registry(self) -> str | None:
        """The dictionary that names the loss."""
        return next((name for name in REGISTRIES if self.loss in declared.names("cankd_hf.losses", name)), None)

    def check(self) -> None:
        """Raises `InputError` with all problems of the term's values."""
        if not isinstance(self.loss, str) and not callable(self.loss):
            raise InputError(f"distill.terms: loss: expected a name, a class or an nn.Module, got {self.loss!r}")
        self.raise_problems(f"distill.terms.{self.label}")


@dataclass
class DistillConfig(Section):
    """The `distill:` section: the objective of the student.

    Attributes:
        task_weight: multiplier of the student's own loss, at least 0; 0 trains without labels.
        terms: the distillation losses; by default CanKD with the paper's weight.
        grid: grid on which two maps are compared: the `finer` or `coarser` of the two, `student` or `teacher`.
    """

    place: ClassVar[str] = "distill"

    task_weight: Annotated[float, Ge(0), Say(fix="0 needs no labels")] = 1.0
    terms: list[LossTerm] = field(default_factory=lambda: [LossTerm()])
    grid: Grid = "finer"
