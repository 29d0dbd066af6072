"""The `distill:` section of a recipe: terms and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Ge, Gt, Le, Len, Lt

from cankd_hf.config import declared
from cankd_hf.config.advice import Say, not_one_of
from cankd_hf.config.schema import Section
from cankd_hf.errors import InputError

Grid = Literal["finer", "coarser", "student", "teacher"]
RECOMMENDED_SHARE = 0.5  # of the gradient at the taps, for all terms on maps together
# How a teacher's map is conditioned before a loss compares it: see `losses/targets.py`.
Conditioning = Literal["none", "layer", "l2", "channel", "global", "phi_s", "clip"]
GRIDS: tuple[str, ...] = get_args(Grid)
Weight = Annotated[float, Ge(0), Say(fix="10 is the paper's mu = 5")]
Length = Annotated[float, Ge(0), Say(fix="below 1 it is a fraction of the run, else steps; 0 switches it off")]
Part = Annotated[float, Ge(0), Le(1), Say(fix="0.5 is the middle of the run")]
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
        fade: [start, end], shares of the run: the weight falls linearly from 1 at `start` to 0 at `end` and stays 0,
            and from then on the teacher is not asked any more; instead of `decay`.
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
    fade: Annotated[list[Part], Len(2, 2), Say(fix="[0.3, 0.6] falls from 30% to 60% of the run")] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    teacher: str | None = None
    conditioning: Conditioning = "none"

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
        if self.fade is not None:
            start, end = (share * max_steps for share in self.fade)
            down = (end - step) / (end - start) if end > start else float(step < end)
        return max(0.0, min(1.0, up, down))

    def taught(self, max_steps: int) -> int:
        """Number of optimizer steps of the run after which the weight is 0 for good."""
        if not self.counts:
            return 0
        return max_steps if self.fade is None else math.ceil(self.fade[1] * max_steps)

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

    @property
    def reads_maps(self) -> bool:
        """Whether it compares maps, as far as the signature of its loss tells, and not logits."""
        if not isinstance(self.loss, str) or self.loss not in declared.names("cankd_hf.losses", "LOSSES"):
            return True
        return "channels" in declared.entry_parameters("cankd_hf.losses", "LOSSES", self.loss)

    def recommended(self, share: float) -> LossTerm:
        """The term with a weight and a schedule that do not hurt; one on logits, or of weight 0, keeps its weight.

        Args:
            share: of the gradient at its taps.
        """
        weight = Share(share) if self.counts and self.reads_maps else self.weight
        options = {**self.options, "gate": 0.1} if self.loss == "cankd" else self.options
        return replace(self, weight=weight, warmup=0.05, decay=0.0, fade=[0.5, 0.9], options=options)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges: an unknown loss, a name that the logs or torch use otherwise."""
        if "." in self.label or self.label == "task":
            yield "name", f"expected a name other than `task`, without dots, got {self.label!r}; rename the term"
        if self.fade is not None and (self.fade[0] > self.fade[1] or self.fade[1] == 0):
            yield "fade", f"expected [start, end] with 0 <= start <= end and end above 0, got {self.fade}"
        if self.fade is not None and self.decay:
            yield "fade", "expected fade or decay, got both; leave one out"
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
class Guard(Section):
    """When a term that fights the task, or has nothing to do with it, is turned down.

    Args:
        angle: the smoothed cosine between the gradients of the task and of a term, at the term's taps, below which it
            is turned down. 0 is no relation; that of a teacher which helps is a few hundredths for maps, and more
            for logits.
        patience: measurements in a row that are needed before a weight is halved, or doubled again.
        floor: least part of its weight that a term keeps.
        holdout: part of the training images that is held out, on which the cosine is measured instead; 0 for none.
    """

    place: ClassVar[str] = "distill.guard"

    angle: Annotated[float, Ge(-1), Le(1), Say(fix="0.005 is next to no relation")] = 0.005
    patience: Annotated[int, Ge(1), Le(1000), Say(fix="4 is the default")] = 4
    floor: Annotated[float, Gt(0), Le(1), Say(fix="0.01 is a hundredth of the weight")] = 0.01
    holdout: Annotated[float, Ge(0), Le(0.5), Say(fix="0.05 holds out every twentieth training image")] = 0.0


@dataclass
class DistillConfig(Section):
    """The `distill:` section: the objective of the student.

    Attributes:
        task_weight: multiplier of the student's own loss, at least 0; 0 trains without labels.
        terms: the distillation losses; by default CanKD with the paper's weight.
        grid: grid on which two maps are compared: the `finer` or `coarser` of the two, `student` or `teacher`.
        frozen: modules of the student that are not trained, such as `backbone`: neither weights nor BatchNorm
            statistics change. `encoder` is the backbone, or else the encoder, whatever the model calls it.
        weights: `as_written`, or `recommended`: in place of the weights and schedules of all terms those that do not
            hurt, and the guard; it is written out when the recipe is read.
        guard: `true`, or its settings: a run watches whether the terms fight the task, and turns down those that do;
            null: only with `weights: recommended`.
    """

    place: ClassVar[str] = "distill"

    task_weight: Annotated[float, Ge(0), Say(fix="0 needs no labels")] = 1.0
    terms: list[LossTerm] = field(default_factory=lambda: [LossTerm()])
    grid: Grid = "finer"
    frozen: list[str] | None = None
    weights: Literal["as_written", "recommended"] = "as_written"
    guard: bool | Guard | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights == "recommended" and self.task_weight:
            mapped = sum(term.counts and term.reads_maps for term in self.terms)
            self.terms = [term.recommended(RECOMMENDED_SHARE / max(mapped, 1)) for term in self.terms]
            self.guard = True if self.guard is None else self.guard
            self.weights = "as_written"
        if self.guard is True:
            self.guard = Guard()

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges: what is measured against the task needs one."""
        for key in ("weights", "guard"):
            if not self.task_weight and getattr(self, key) not in ("as_written", None, False):
                yield key, "is about the terms beside the task, and task_weight is 0; leave it out"

    def without_task(self, kept: Collection[str] = ()) -> DistillConfig:
        """The section for a phase without the task's loss: what is measured against that is left out.

        A share becomes the weight 1, a term does not fade, as nothing takes over, and there is no guard.

        Args:
            kept: keys that stay as they are, as the phase has its own.
        """
        terms = [
            replace(term, weight=1.0 if isinstance(term.weight, Share) else term.weight, fade=None)
            for term in self.terms
        ]
        return replace(
            self, terms=self.terms if "terms" in kept else terms, guard=self.guard if "guard" in kept else None
        )

    @property
    def guarding(self) -> Guard | None:
        """The guard, if it is on."""
        return self.guard if isinstance(self.guard, Guard) else None
