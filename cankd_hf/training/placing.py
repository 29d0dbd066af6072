"""From a term of the objective to its losses: one module for each pair of levels, or one for logits."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from cankd_hf.config.advice import nearest
from cankd_hf.config.distill import LossTerm, Share
from cankd_hf.errors import InputError
from cankd_hf.features.pairing import pair_levels
from cankd_hf.features.taps import Level
from cankd_hf.losses import loss_named
from cankd_hf.losses.base import DistillationLoss, FeatureLoss
from cankd_hf.losses.targets import CONDITIONINGS

ENCODER = "encoder"  # name of the part before neck and head, whatever a model calls it


class Pair(tuple[Any, ...]):
    """A level of the student and a level of a teacher; with one teacher equal to the tuple `(student, teacher)`."""

    def __new__(cls, student: int, teacher: int, of: str = "") -> Pair:
        return super().__new__(cls, (student, teacher, of) if of else (student, teacher))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    @property
    def student(self) -> int:
        """Index of the student's level."""
        return int(self[0])

    @property
    def teacher(self) -> int:
        """Index of the teacher's level."""
        return int(self[1])

    @property
    def of(self) -> str:
        """Name of the teacher; empty where there is only one."""
        return str(self[2]) if len(self) > 2 else ""

    @property
    def name(self) -> str:
        """`s0t2`: student level 0 with teacher level 2; with several teachers `dino_s0t2`."""
        return f"{self.of}{'_' if self.of else ''}s{self.student}t{self.teacher}"


class TeacherLevel(NamedTuple):
    """A map of a teacher."""

    teacher: str  # its name
    number: int  # of the map in its outputs

    def name(self, kind: str) -> str:
        """Name of the module that conditions it: `teacher_t0_phi_s`."""
        return f"{self.teacher}_t{self.number}_{kind}"


class Placed(NamedTuple):
    """One loss of a term: its module, what it compares, and its weight."""

    term: LossTerm
    teacher: str  # name of the teacher it learns from
    pair: Pair | None  # the maps that it compares; None for logits
    weight: float  # multiplier of its value
    loss: nn.Module

    @property
    def name(self) -> str:
        """Name in logs: `cankd/s0t2`; for logits the name of the term."""
        return self.term.label if self.pair is None else f"{self.term.label}/{self.pair.name}"

    @property
    def conditioned(self) -> str:
        """Name of the module that conditions the teacher's map; empty without one."""
        if self.pair is None or self.term.conditioning == "none":
            return ""
        return TeacherLevel(self.teacher, self.pair.teacher).name(self.term.conditioning)

    @property
    def place(self) -> str:
        """In messages."""
        return f"distill.terms.{self.term.label}.loss"

    @property
    def has_branch(self) -> bool:
        """Whether the loss has a learned branch whose share is logged."""
        cls = type(self.loss)
        return issubclass(cls, DistillationLoss) and cls.branch_share is not DistillationLoss.branch_share


@dataclass
class TeacherShape:
    """Shapes of a teacher's outputs."""

    levels: list[Level] = field(default_factory=list)  # its maps
    logits: Sequence[int] | None = None  # shape for one image; None without logits
    dense: Sequence[int] | None = None  # shape [1, A, K] of a dense detector's class logits; None of other models
    queries: Sequence[int] | None = None  # shape [1, N, K] of the class logits of a DETR-like detector's queries
    without: str = ""  # why there are no logits, for messages
    source: Any = field(default=None, repr=False, compare=False)  # the teacher itself, whose head may be run


def as_teachers(teachers: Mapping[str, TeacherShape] | Sequence[Level]) -> dict[str, TeacherShape]:
    """Shapes by name; a list of levels becomes a single teacher called `teacher`."""
    if isinstance(teachers, Mapping):
        return dict(teachers)
    return {"teacher": TeacherShape(list(teachers))} if teachers else {}


def check_label(term: LossTerm) -> None:
    """Raises `InputError` for a name under which an `nn.ModuleDict` cannot hold the term's losses."""
    if hasattr(nn.ModuleDict(), term.label):
        raise InputError(f"term {term.label!r}: nn.ModuleDict has an attribute of this name; rename the term")


def loss_class(term: LossTerm) -> type[DistillationLoss]:
    """The class of a term's loss; `FeatureLoss` for a plain module, which compares maps."""
    loss = loss_named(term.loss) if isinstance(term.loss, str) else term.loss
    cls = loss if isinstance(loss, type) else type(loss)
    return cls if issubclass(cls, DistillationLoss) else FeatureLoss


def reads(term: LossTerm) -> str:
    """What a term compares: `maps`, `logits`, `dense` predictions or `queries`."""
    return loss_class(term).reads


def pairs_of(term: LossTerm, levels: Sequence[Level], teacher: TeacherShape, name: str) -> list[Pair | None]:
    """The pairs of levels that a term compares; `[None]` if it compares no maps."""
    if (what := reads(term)) != "maps":
        if term.pairs != "auto":
            raise InputError(f"distill.terms.{term.label}.pairs: {term.loss_name} reads {what}; leave pairs out")
        if isinstance(term.weight, Share):
            place = f"distill.terms.{term.label}.weight.share"
            raise InputError(f"{place}: is measured on maps, and {term.loss_name} reads {what}; give a number")
        if term.conditioning != "none":
            place = f"distill.terms.{term.label}.conditioning"
            raise InputError(f"{place}: is of maps, and {term.loss_name} reads {what}; leave it out")
        return [None]
    return [Pair(*pair, name) for pair in pair_levels(levels, teacher.levels, term.pairs)]


def make_loss(term: LossTerm, width: int, again: bool, further: Mapping[str, Any] | None = None) -> nn.Module:
    """The loss of one pair, for `width` channels or classes; a module that is in use already (`again`) is copied.

    `further` are arguments that the models decide.
    """
    place = f"distill.terms.{term.label}"
    if isinstance(term.loss, nn.Module):
        if term.options:
            raise InputError(f"{place}.options: expected none beside a module, got {term.options}; build it with them")
        return copy.deepcopy(term.loss) if again else term.loss
    cls = loss_named(term.loss) if isinstance(term.loss, str) else term.loss
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(f"{place}.loss: expected a name, a class or a module, got {cls!r}; give an nn.Module")
    arguments = (width,) if issubclass(cls, DistillationLoss) else ()
    options = {**term.options, **(further or {})}
    try:
        inspect.signature(cls).bind(*arguments, **options)
    except TypeError as error:
        raise InputError(f"{place}.options: {term.loss_name}: {error}") from error
    return cls(*arguments, **options)


def conditionings(
    placed: Iterable[Placed], teachers: Mapping[str, TeacherShape], known: nn.ModuleDict, device: torch.device
) -> nn.ModuleDict:
    """The modules that condition the teachers' maps, by `Placed.conditioned`; those that are known are kept."""
    made: dict[str, nn.Module] = {}
    for item in placed:
        if (name := item.conditioned) and item.pair is not None and name not in made:
            channels = teachers[item.teacher].levels[item.pair.teacher].channels
            made[name] = dict(known.items()).get(name) or CONDITIONINGS[item.term.conditioning](channels).to(device)
    return nn.ModuleDict(made)


def frozen_part(student: nn.Module, part: str) -> str:
    """The path of a frozen module; `encoder` is the outermost `backbone`, or else the outermost `encoder`."""
    if part != ENCODER:
        return part
    paths = sorted((name for name, _ in student.named_modules()), key=lambda name: name.count("."))
    found = (path for last in ("backbone", ENCODER) for path in paths if path.rpartition(".")[2] == last)
    return next(found, part)


def freeze(student: nn.Module, parts: Iterable[str], thawed: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Freezes modules of the student, after unfreezing the parameters `thawed` that an earlier call froze.

    Returns their parameters that required a gradient before.
    """
    modules = dict(student.named_modules())
    parts = [frozen_part(student, part) for part in parts]
    unknown = [part for part in parts if not part or part not in modules]
    if unknown:
        raise InputError(
            [f"frozen: the student has no module {part!r}; {nearest(part, list(modules)[1:])}" for part in unknown]
        )
    for parameter in thawed:
        parameter.requires_grad_(True)
    trained = [p for part in parts for p in modules[part].parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    return trained
