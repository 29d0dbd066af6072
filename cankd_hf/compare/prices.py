"""Prices: what a step of each arm cost in a calibration that was saved, for runs that cannot measure it themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cankd_hf.compare.arms import Arm
from cankd_hf.compare.origin import code_hash, machine
from cankd_hf.compare.records import Records, key_of, unit_of
from cankd_hf.config.parts import part_of
from cankd_hf.config.recipe import Recipe
from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json

# No run corrects a price, so that it is measured until its relative standard error is this, or so often.
PRECISION, MOST_ROUNDS = 0.02, 40


@dataclass(frozen=True)
class Prices:
    """What arms cost, by a saved calibration.

    Attributes:
        file: where they are from.
        unit: the clock of the seconds.
        step: seconds of a step, by arm.
        errors: the standard error of that, relative to it, by arm; empty where it was not measured.
        before: seconds that every run of an arm spent before it: labels of a teacher, its answers for whole images.
        where: the machine that they were measured on.
    """

    file: str
    unit: str
    step: dict[str, float]
    errors: dict[str, float]
    before: dict[str, float]
    where: str

    def cost(self, arm: str, steps: float) -> float:
        """Seconds of so many steps of an arm."""
        return self.before[arm] + steps * self.step[arm]

    def steps(self, arm: str, seconds: float) -> int:
        """Steps of an arm that these seconds buy; 0 where what was spent before leaves none."""
        return max(0, round((seconds - self.before[arm]) / self.step[arm]))


def saved(measured: Mapping[str, Any], arms: Mapping[str, Arm], records: Records) -> dict[str, Any]:
    """A calibration as it is saved: with the recipes of the arms, so that no others are paid by it."""
    recipes = {name: records.told(arm.recipe) for name, arm in arms.items()}
    return {**measured, "recipes": recipes, "code": code_hash(), "machine": machine()}


def read_prices(file: str, arms: Mapping[str, Arm], records: Records) -> Prices:
    """The prices of arms from a file.

    Raises:
        InputError: where there is none, or for arms that it does not price: others, of another recipe, or with a store
            of their teacher's outputs by views, whose number depends on the steps.
    """
    again = f"by --calibrate {file}"
    if not Path(file).is_file():
        raise InputError(f"budgets: prices: expected a file, got {file!r}, which is none; write it {again}")
    found = read_json(Path(file))
    costs, recipes = found.get("arms", {}), found.get("recipes", {})
    wrong = []
    for name, arm in arms.items():
        if name not in costs or name not in recipes:
            why = found.get("failed", {}).get(name, "it is not in the file")
            wrong.append(f"{file}: {name} has no price: {why}; write it again {again}")
        elif key_of(recipes[name]) != records.recipe_key(arm.recipe):
            wrong.append(f"{file}: {name} was priced with another recipe; write it again {again}")
        elif _stores(arm.recipe):
            wrong.append(
                f"{file}: what the store of {name} costs (teacher.cache.views) is in no price; set "
                "teacher.cache.whole: true, or leave it out"
            )
    if wrong:
        raise InputError(wrong)
    unit = unit_of(next(iter(costs.values())), records.by_clock)
    where = " ".join(str(value) for value in found.get("machine", {}).values())
    step = {name: float(costs[name][unit]) for name in arms}
    before = {name: float(found.get("before", {}).get(name, {}).get(unit, 0.0)) for name in arms}
    errors = {name: float(error[unit]) for name, error in found.get("errors", {}).items() if name in arms}
    return Prices(file, unit, step, errors, before, where)


def _stores(recipe: Recipe) -> bool:
    """Whether a run stores answers of its teacher for views."""
    parts = [recipe, *(part_of(recipe, phase) for phase in recipe.phases or ())]
    caches = [config.cache for part in parts for config in part.named_teachers().values()]
    return any(cache is not None and not cache.whole for cache in caches)
