"""The `phases:` of a recipe: parts of a run one after another, and the words of `schedule:` that stand for them."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

from annotated_types import Gt, Le

from cankd_hf.config.advice import Say
from cankd_hf.config.data import DataConfig
from cankd_hf.config.declared import fields
from cankd_hf.config.schema import Section
from cankd_hf.errors import InputError

Schedule = Literal["joint", "features_then_task", "warm_start", "frozen_encoder", "polish", "recommended"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
# Shares of the words: of the part without labels, and of the last part of `polish`, one half at each resolution.
FEATURES, WARM, POLISH = 0.4, 0.2, 0.2
LARGER, GRID = 1.25, 32  # of `polish`: its first resolution, and what sides are rounded up to
POLISH_RATE = 0.1  # of the learning rate
# Settings that are those of the whole run, and of the data set that all phases are scored on.
_OF_THE_RUN = {
    "training": ("max_steps", "num_train_epochs", "output_dir", "seed", "run_name", "resume_from_checkpoint"),
    "data": ("test_split", "image_mean", "image_std", "labels", "num_labels", "ignore_index", "reduce_labels"),
}


@dataclass
class Phase(Section):
    """A part of a run, with changes to the sections of the recipe; what it does not name is as there.

    Args:
        name: in folders, logs and tables.
        share: its part of the optimizer steps; those of all phases add up to 1.
        distill: changes to `distill:`; `{task_weight: 0}` learns from the teacher alone and reads no labels,
            `{terms: []}` from the labels alone. A list of terms takes the place of the recipe's.
        data: changes to `data:`, such as sizes and augmentation, or another set for a phase without labels.
        training: changes to `training:`. Schedules span the steps of the phase; what the recipe counts in steps keeps
            its share of them.
        frozen: modules of the student that do not change, such as `backbone`: neither weights nor BatchNorm
            statistics. `encoder` is the backbone, or else the encoder, whatever the model calls it.
        carry: `connectors` goes on with connectors, losses and statistics of the phase before, where the terms are
            the same; `fresh` makes them anew. The student always goes on, the optimizer never.
    """

    place: ClassVar[str] = "phases.0"

    name: str
    share: Annotated[float, Gt(0), Le(1), Say(fix="0.4 is 40% of the steps")]
    distill: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    carry: Literal["connectors", "fresh"] = "connectors"

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges: a name that is no folder's, settings of the whole run."""
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,60}", self.name):
            yield "name", f"expected letters, digits, _ and -, got {self.name!r}; rename the phase"
        for section, names in _OF_THE_RUN.items():
            for key in set(names) & getattr(self, section).keys():
                counted = key in ("max_steps", "num_train_epochs")
                fix = "its share says how many steps it has" if counted else "leave it out"
                yield f"{section}.{key}", f"is the same for the whole run; {fix}"

    def accepted(self) -> dict[str, dict[str, Any]]:
        """Names and types of the settings in `distill` and `data`."""
        distill = fields("cankd_hf.config.distill", "DistillConfig")
        return {"distill": dict.fromkeys(distill, Any), "data": dict.fromkeys(vars(DataConfig()), Any)}

    def reads_labels(self, task_weight: float) -> bool:
        """Whether it has a task loss; `task_weight` is that of the recipe."""
        return bool(self.distill.get("task_weight", task_weight))


def phases_of(
    word: str, data: DataConfig, learning_rate: float, task_weight: float = 1.0, guarded: bool = False
) -> list[Phase]:
    """The phases that a word stands for.

    Args:
        word: one of `SCHEDULES`.
        data: of the recipe: `polish` needs its sizes.
        learning_rate: of the recipe.
        task_weight: of the recipe; without labels `recommended` has no guard.
        guarded: whether the recipe says itself whether there is a guard, which `recommended` leaves as it is.

    Raises:
        InputError: where there is no size to change, as `polish` does.
    """
    alone: dict[str, Any] = {"task_weight": 0.0}
    labels: dict[str, Any] = {"terms": []}
    if word == "features_then_task":
        return [Phase("features", FEATURES, distill=alone), Phase("task", 1 - FEATURES, distill=labels)]
    if word == "warm_start":
        return [Phase("warm_start", WARM, distill=alone), Phase("joint", 1 - WARM)]
    if word == "frozen_encoder":
        frozen = Phase("task", 1 - FEATURES, distill=labels, frozen=["encoder"])
        return [Phase("features", FEATURES, distill=alone), frozen]
    slow: dict[str, Any] = {"learning_rate": learning_rate * POLISH_RATE, "warmup_steps": 0}
    if word == "polish":
        larger = Phase("polish_larger", POLISH / 2, data=_larger(data), training=slow)
        return [Phase("joint", 1 - POLISH), larger, Phase("polish", POLISH / 2, training=dict(slow))]
    if word == "recommended" and task_weight:
        # The best arm so far: docs/phases.md says what speaks for it. It is changed here when the results change.
        return [Phase("joint", 1.0, distill={} if guarded else {"guard": True})]
    return [Phase("joint", 1.0)]


def _larger(data: DataConfig) -> dict[str, Any]:
    """The size in training times `LARGER`, in whole cells of the coarsest map."""
    key = "crop_size" if data.crop_size is not None else "image_size"
    size = getattr(data, key)
    if size is None:
        raise InputError("schedule: polish changes data.crop_size or data.image_size, and there is none; give one")
    return {key: [math.ceil(side * LARGER / GRID) * GRID for side in size]}


def without_teacher(phases: Sequence[Phase], task_weight: float) -> list[Phase] | None:
    """The phases of a student alone: those with labels, without terms and frozen parts, each with its share of the
    steps of all; None where this is one part like the recipe."""
    kept = [phase for phase in phases if phase.reads_labels(task_weight)]
    whole = sum(phase.share for phase in kept)
    made = [
        replace(
            phase,
            share=phase.share / whole,
            distill={key: value for key, value in phase.distill.items() if key not in ("terms", "weights", "guard")},
            frozen=[],
        )
        for phase in kept
    ]
    if not made or (len(made) == 1 and not (made[0].data or made[0].training or made[0].distill)):
        return None
    return made


def teachers_of(phase: Phase) -> set[str | None]:
    """The names of the teachers in the terms that a phase has of its own, which may be written as in YAML."""
    terms = phase.distill.get("terms")
    return set(map(_teacher_of, terms)) if isinstance(terms, list) else set()


def _teacher_of(term: Any) -> str | None:
    name = term.get("teacher") if isinstance(term, dict) else getattr(term, "teacher", None)
    return name if isinstance(name, str) else None


def without_terms_of(phase: Phase, names: Container[str | None]) -> Phase:
    """The phase without the terms of its own that learn from some teachers."""
    if not teachers_of(phase):
        return phase
    kept = [term for term in phase.distill["terms"] if _teacher_of(term) not in names]
    return replace(phase, distill={**phase.distill, "terms": kept})


def phase_problems(phases: Sequence[Phase]) -> Iterator[tuple[str, str]]:
    """What is wrong with phases as a whole: key and message of each."""
    if not phases:
        yield "phases", "expected at least one phase, got an empty list; write null for none"
        return
    whole = sum(phase.share for phase in phases)
    if abs(whole - 1) > 1e-6:
        shares = " + ".join(f"{phase.share:g}" for phase in phases)
        yield "phases", f"the shares add up to {whole:.6g} ({shares}); make them add up to 1"
    names = [phase.name for phase in phases]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "phases", f"two phases are called {name!r}; rename one"


def steps_of(shares: Sequence[float], total: int) -> list[int]:
    """Optimizer steps of each phase; their sum is `total`.

    Raises:
        InputError: for fewer steps than phases.
    """
    if total < len(shares):
        raise InputError(f"phases: expected at least one step for each of {len(shares)} phases, got {total} steps")
    ends: list[int] = []
    done = 0.0
    for number, share in enumerate(shares, 1):
        done += share
        earlier = ends[-1] if ends else 0
        ends.append(min(max(round(done * total), earlier + 1), total - len(shares) + number))
    ends[-1] = total
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
