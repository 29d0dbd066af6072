"""A recipe at another number of steps, and the recipes of its phases, each of an ordinary run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from cankd_hf.config.distill import LossTerm
from cankd_hf.config.phases import Phase
from cankd_hf.config.recipe import Recipe, check_together
from cankd_hf.config.schema import Problems, Section
from cankd_hf.config.training import read_training
from cankd_hf.errors import InputError

Changed = TypeVar("Changed", bound=Section)
# A phase without a task loss has no score to choose by: its student's head is not trained.
_UNSCORED = {"eval_strategy": "no", "load_best_model_at_end": False}


def spanning(recipe: Recipe, steps: int, before: int | None = None) -> Recipe:
    """The recipe with this many steps; what it counts in steps keeps its share of the run.

    Args:
        recipe: with `training.max_steps`, or without.
        steps: of the new recipe.
        before: steps that the recipe is written for; by default its `max_steps`.
    """
    before = recipe.training.get("max_steps", -1) if before is None else before
    factor = steps / before if before > 0 else 1.0
    terms = [
        replace(term, warmup=float(_scaled(term.warmup, factor)), decay=float(_scaled(term.decay, factor)))
        for term in recipe.distill.terms
    ]
    phases = None
    if recipe.phases is not None:
        phases = [replace(phase, training=_spanned(phase.training, factor)) for phase in recipe.phases]
        phases = [replace(phase, distill=_spanned_terms(phase.distill, factor)) for phase in phases]
    training = {**_spanned(recipe.training, factor), "max_steps": steps}
    if isinstance(part := training.get("eval_steps"), float) and part <= 1 and not phases:
        training["eval_steps"] = max(1, int(steps * part + 1e-9))  # rounded down: the last is near the end
    return replace(recipe, training=training, distill=replace(recipe.distill, terms=terms), phases=phases)


def _scaled(count: Any, factor: float) -> Any:
    """A number of steps; below 1 it is a share already."""
    return max(1, round(count * factor)) if isinstance(count, int | float) and count >= 1 else count


def _spanned(training: Mapping[str, Any], factor: float) -> dict[str, Any]:
    made = dict(training)
    if "warmup_steps" in made:
        made["warmup_steps"] = _scaled(made["warmup_steps"], factor)
    kwargs = made.get("lr_scheduler_kwargs")
    if isinstance(kwargs, dict):
        made["lr_scheduler_kwargs"] = {
            key: _scaled(value, factor) if key.startswith("num_") and key.endswith("_steps") else value
            for key, value in kwargs.items()
        }
    return made


def _spanned_terms(distill: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Changes to `distill:`, whose terms may be written as in YAML."""
    if not isinstance(distill.get("terms"), list):
        return dict(distill)
    terms = [dict(term) if isinstance(term, Mapping) else dict(vars(term)) for term in distill["terms"]]
    for term in terms:
        term |= {key: float(_scaled(term[key], factor)) for key in ("warmup", "decay") if key in term}
    return {**distill, "terms": terms}


def part_of(recipe: Recipe, phase: Phase, steps: int | None = None, whole: int | None = None) -> Recipe:
    """The recipe of one phase, without phases of its own, and without teachers where no term learns from them.

    Args:
        recipe: the whole one.
        phase: one of its phases.
        steps: that the phase has; None where they are not known yet.
        whole: steps of all phases.

    Raises:
        InputError: for values of the phase that a section does not take.
    """
    index = (recipe.phases or [phase]).index(phase)
    base = replace(recipe, phases=None)
    base = base if steps is None else spanning(base, steps, whole)
    distill = _changed(base.distill, phase.distill, f"phases.{index}.distill")
    data = _changed(base.data, phase.data, f"phases.{index}.data")
    if phase.frozen:
        distill = replace(distill, frozen=list(phase.frozen))
    ready = {name: replace(teacher, fit=None) for name, teacher in base.named_teachers().items()}  # trained before
    if not distill.terms:
        base = replace(base, teacher=None, teachers=None, student=replace(base.student, inherit=[]))
    else:
        base = base.with_teachers(ready)
    training = {**base.training, **phase.training}
    if distill.task_weight == 0 and recipe.distill.task_weight > 0:
        distill = distill.without_task(kept=phase.distill)
        training |= {key: value for key, value in _UNSCORED.items() if key not in phase.training}
        if training.get("save_strategy") == "best" and "save_strategy" not in phase.training:
            training["save_strategy"] = "steps"
    if steps is not None:
        training["max_steps"] = steps
        for key in ("eval_steps", "save_steps"):  # a phase that is shorter is looked at when it ends
            if isinstance(every := training.get(key), int | float) and every > steps:
                training[key] = steps
    return replace(base, distill=distill, data=data, training=training, schedule=None, baseline=False)


def terms_of(recipe: Recipe) -> list[LossTerm]:
    """The terms of a recipe, of all its phases where it has any."""
    if not recipe.phases:
        return list(recipe.distill.terms)
    return [term for phase in recipe.phases for term in part_of(recipe, phase).distill.terms]


def with_terms(recipe: Recipe, change: Callable[[list[LossTerm]], list[LossTerm]]) -> Recipe:
    """The recipe with other terms, those that phases have of their own changed in the same way."""
    phases = recipe.phases
    if phases is not None:
        phases = [replace(phase, distill=_with_terms(recipe, phase, change)) for phase in phases]
    return replace(recipe, distill=replace(recipe.distill, terms=change(recipe.distill.terms)), phases=phases)


def _with_terms(recipe: Recipe, phase: Phase, change: Callable[[list[LossTerm]], list[LossTerm]]) -> dict[str, Any]:
    """Changes of a phase to `distill:`, with its own terms, or the weights that it recommends, written out."""
    distill = dict(phase.distill)
    if distill.get("weights") == "recommended":
        distill = {"guard": True, **distill}
    elif not distill.get("terms"):
        return distill
    distill.pop("weights", None)
    return {**distill, "terms": change(part_of(recipe, phase).distill.terms)}


def check_phases(problems: Problems, recipe: Recipe) -> None:
    """Adds what is wrong with each phase as a recipe of its own, if the sections could be read."""
    if not problems.usable("phases", "schedule", "distill", "data", "training") or problems.found:
        return
    try:
        whole = recipe.resolved()
    except InputError as error:
        problems.take(error, "schedule")
        return
    for index, phase in enumerate(whole.phases or ()):
        place = f"phases.{index}" if recipe.phases else "schedule"
        inner = Problems()
        try:
            read_training(inner, phase.training, "training")
            part = part_of(whole, phase)
            inner.check(part, "")
            check_together(inner, part)
        except InputError as error:
            problems.take(error, place)
            continue
        for path, message in inner.found:
            problems.say(f"{place}.{path}" if recipe.phases else place, message)


def phase_parts(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The place of each phase in messages, and its recipe."""
    whole = recipe.resolved()
    return [(f"phases.{index}", part_of(whole, phase)) for index, phase in enumerate(whole.phases or ())]


def _changed(section: Changed, changes: Mapping[str, Any], path: str) -> Changed:
    """A section with some of its values in another way."""
    if not changes:
        return section
    problems = Problems()
    made: Changed | None = problems.read(type(section), {**vars(section), **changes}, path)
    problems.raise_all()
    assert made is not None
    return made
