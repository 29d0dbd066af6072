"""Phases of a run: a chain of ordinary runs in subfolders, each going on with the student of the one before."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cankd_hf.config.parts import part_of
from cankd_hf.config.phases import Phase, steps_of
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.seeds import derived_seed
from cankd_hf.errors import InputError
from cankd_hf.hub.facts import write_facts
from cankd_hf.hub.files import read_json
from cankd_hf.json_text import to_json
from cankd_hf.names import FACTS_FILE, STATE_FILE
from cankd_hf.runs.record import Arm, write_text
from cankd_hf.tasks import Task, TaskData
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.monitoring.cost import CLOCKS, CPU, DEVICE, PREPAID, SETUP, WALL, CostMeter
from cankd_hf.training.phases import Ended, go_on

logger = logging.getLogger(__name__)

_PAID = "phase "  # how the names of earlier phases begin among what was prepaid


@dataclass
class Part:
    """One run of an arm: one of its phases, or all of it.

    Attributes:
        name: of the run; that of the last one is the arm's.
        folder: of the run; that of the last one is the arm's.
        recipe: of the run, without phases.
        phase: None for an arm without phases.
        earlier: the parts before it.
        arms: the finished runs of these.
        last: whether its record is that of the arm.
        scored: whether its student has a score: not where nothing trains its head, though later phases do.
    """

    name: str
    folder: Path
    recipe: Recipe
    phase: Phase | None = None
    earlier: list[Part] = field(default_factory=list)
    arms: list[Arm] = field(default_factory=list)
    last: bool = True
    scored: bool = True

    @property
    def title(self) -> str:
        """In messages."""
        return self.name if self.phase is None or not self.last else f"{self.name}, phase {self.phase.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """Further training arguments: an order of the images of its own."""
        if not self.earlier or self.phase is None:
            return {}
        given = self.recipe.training.get("data_seed")
        return {"data_seed": derived_seed(self.recipe.seed if given is None else given, self.phase.name) % 2**32}

    def taught_by(self, teachers: Mapping[str, Teacher]) -> dict[str, Teacher]:
        """Those of the teachers that a phase learns from; of an arm without phases all."""
        named = {term.teacher for term in self.recipe.distill.terms}
        if self.phase is None or (named and len(teachers) == 1):
            return dict(teachers)
        return {name: teacher for name, teacher in teachers.items() if name in named}

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is of this part: it lies in its folder, or for the last one in none of the others'."""
        place = checkpoint.resolve().parent
        return place == self.folder.resolve() or (
            self.last and all(place != part.folder.resolve() for part in self.earlier)
        )

    def ended(self, arm: Arm) -> Arm:
        """The record of the arm, once its last part has ended; its facts and log are put together too."""
        if self.phase is None or not self.last:
            return arm
        parts = [*self.earlier, self]
        made = whole_arm(parts, [*self.arms, arm])
        write_whole(parts, made)
        return made

    def charge(self, meter: CostMeter, data: TaskData) -> None:
        """Charges what its data cost, the phases before, in full, and what was spent before these."""
        for name, seconds in data.facts.get("prepaid", {}).items():
            meter.prepay(name, seconds)
        for part, arm in zip(self.earlier, self.arms, strict=True):
            for name, seconds in arm.prepaid.items():
                meter.prepay(name, seconds)
            if part.phase is not None:
                meter.prepay(_PAID + part.phase.name, own_cost(arm))

    def go_on(self, distiller: Distiller) -> None:
        """Gives the student, and the connectors and losses that are carried, the weights of the phases before."""
        if not self.earlier:
            return
        ended = [
            Ended(part.folder, part.recipe.distill.terms, part.phase is not None and part.phase.carry == "fresh")
            for part in self.earlier
        ]
        count = go_on(distiller, ended, self.phase is not None and self.phase.carry == "fresh")
        carried = f", with {count} tensors of connectors and losses" if count else ""
        logger.warning("%s: goes on with the student of %s%s", self.title, self.earlier[-1].folder, carried)


@contextmanager
def problems_in(phase: Phase) -> Iterator[None]:
    """Adds the name of a phase to what is wrong with it."""
    try:
        yield
    except InputError as error:
        raise InputError([f"phase {phase.name}: {problem}" for problem in error.problems]) from error


def open_phase(part: Recipe, task: Task, data: TaskData) -> TaskData:
    """The data of a phase that has its own; without a task loss another set needs no labels.

    Raises:
        InputError: for data that cannot be used, or of other classes.
    """
    kind, another = type(task), part.data.path != data.facts.get("source")
    if another and not part.labelled and kind.takes_labels:
        images = kind.images(part.data)
        spent = {**data.facts.get("prepaid", {}), **images.facts.get("prepaid", {})}
        facts = {**data.facts, **({"prepaid": spent} if spent else {})}
        return replace(data, train=images.train, unlabelled=images.unlabelled, facts=facts)
    labelled = part.labelled or kind.takes_labels  # those of the recipe's own set are there, and not used
    found, opened = kind.from_data(part.data, labelled=labelled, splits=("train", "eval"))
    if found.id2label != task.id2label:
        raise InputError(f"data.path {part.data.path}: its classes differ from those of the recipe's data")
    return opened


def parts_of(recipe: Recipe, name: str, folder: Path, total: int) -> list[Part]:
    """The runs of an arm: one for each phase, or one.

    Args:
        recipe: of the arm.
        name: of the arm.
        folder: of the arm.
        total: its optimizer steps; not used without phases.
    """
    if not recipe.phases:
        return [Part(name, folder, recipe)]
    parts: list[Part] = []
    count = len(recipe.phases)
    for number, (phase, steps) in enumerate(
        zip(recipe.phases, steps_of([phase.share for phase in recipe.phases], total), strict=True), 1
    ):
        last = number == count
        own = name if last else f"{name}, phase {phase.name}"
        place = folder if last else folder / f"phase-{number}-{phase.name}"
        made = part_of(recipe, phase, steps, total)
        scored = last or made.labelled or not recipe.labelled
        parts.append(Part(own, place, made, phase, list(parts), last=last, scored=scored))
    return parts


def own_cost(arm: Arm) -> dict[str, float]:
    """What a run itself spent, by clock."""
    return {
        clock: round(arm.cost[clock] - arm.cost.get(clock + PREPAID, 0.0), 3) for clock in CLOCKS if clock in arm.cost
    }


def whole_arm(parts: Sequence[Part], arms: Sequence[Arm]) -> Arm:
    """The record of all phases: the last one's, with the steps, time and cost of all, and what each of them was."""
    last = arms[-1]
    costs = [own_cost(arm) for arm in arms]
    steps, seconds = sum(arm.steps for arm in arms), sum(arm.seconds for arm in arms)
    phases = []
    for part, arm, cost in zip(parts, arms, costs, strict=True):
        assert part.phase is not None
        clock = next((name for name in (DEVICE, CPU, WALL) if name in cost), "")
        spent = sum(one.get(clock, 0.0) for one in costs)
        distill, training = part.recipe.distill, part.recipe.training
        phases.append(
            {
                "name": part.phase.name,
                "folder": "." if part.last else part.folder.name,
                "share": part.phase.share,
                "steps": arm.steps,
                "seconds": arm.seconds,
                "cost": cost,
                "cost_share": round(cost[clock] / spent, 4) if spent > 0 else None,
                "scores": arm.scores,
                "task_weight": distill.task_weight,
                "terms": [term.label for term in distill.terms],
                "frozen": distill.frozen or [],
                "learning_rate": training.get("learning_rate"),
                "working": arm.working,
            }
        )
    return replace(
        last,
        steps=steps,
        seconds=round(seconds, 1),
        cost=_whole_cost(arms, costs, steps),
        prepaid={name: spent for name, spent in last.prepaid.items() if not name.startswith(_PAID)},
        working=next((arm.working for arm in reversed(arms) if arm.working.get("verdict")), last.working),
        phases=phases,
    )


def _whole_cost(arms: Sequence[Arm], own: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """Seconds of all phases by clock.

    `NAME_to_first_step` is such that a run of other steps costs this and that many steps of the mean: what is spent at
    the start of each phase is in it, a step of each is not.
    """
    cost = dict(arms[-1].cost)
    for clock in [clock for clock in CLOCKS if clock in cost]:
        outside = sum(spent.get(clock, 0.0) for name, spent in arms[-1].prepaid.items() if not name.startswith(_PAID))
        starts = [arm.cost.get(clock + SETUP, 0.0) - arm.cost.get(clock + PREPAID, 0.0) for arm in arms]
        spent, further = sum(one.get(clock, 0.0) for one in own), steps - len(arms)
        step = (spent - sum(starts)) / further if further > 0 else spent / steps
        cost[clock + SETUP] = round(cost[clock] - step * (steps - 1), 3)
        cost.pop(clock + PREPAID, None)
        if outside:
            cost[clock + PREPAID] = outside
    return cost


def write_whole(parts: Sequence[Part], arm: Arm) -> None:
    """Puts the facts and the log of all phases into the folder of the last one, for card, figures and comparisons."""
    folder = parts[-1].folder
    found = [read_json(part.folder / FACTS_FILE) for part in parts]
    facts = dict(found[-1])
    taught = next((one for one in reversed(found) if one.get("teacher")), facts)
    facts |= {key: taught[key] for key in ("teacher", "teachers", "terms") if key in taught}
    facts |= {"step": arm.steps, "planned_steps": sum(one.get("planned_steps", 0) for one in found)}
    facts |= {"seconds": arm.seconds, "working": arm.working, "phases": arm.phases}
    facts["teacher_findings"] = list(dict.fromkeys(text for one in found for text in one.get("teacher_findings", [])))
    joules = [one["energy"] for one in found if "energy" in one]
    if joules:
        facts["energy"] = {**joules[-1], "joules": sum(one["joules"] for one in joules)}
    write_facts(folder, facts)
    write_text(folder / STATE_FILE, to_json(_whole_state(parts)))


def _whole_state(parts: Sequence[Part]) -> dict[str, Any]:
    """The Trainer's state of the last phase, with the log of all: steps and epochs count on from phase to phase."""
    history: list[dict[str, Any]] = []
    state: dict[str, Any] = {}
    steps, epochs = 0, 0.0
    for part in parts:
        state = read_json(part.folder / STATE_FILE)
        for entry in state["log_history"]:
            moved = {"step": steps + entry["step"]} | ({"epoch": epochs + entry["epoch"]} if "epoch" in entry else {})
            history.append({**entry, **moved, "phase": part.phase.name if part.phase is not None else ""})
        before, steps, epochs = steps, steps + state["global_step"], epochs + (state.get("epoch") or 0.0)
    best = state.get("best_global_step")
    moved = {} if best is None else {"best_global_step": before + best}
    return {**state, **moved, "global_step": steps, "max_steps": steps, "epoch": epochs, "log_history": history}
