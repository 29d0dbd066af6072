"""What a comparison still has to run, worked out anew from its records: so it goes on wherever it was stopped."""

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from cankd_hf.compare.arms import NO_BLOCK, Arm, TeacherRun, reference_of
from cankd_hf.compare.origin import code_hash
from cankd_hf.compare.outcome import Outcome, Run
from cankd_hf.compare.prices import Prices, read_prices
from cankd_hf.compare.records import CALIBRATION_FILE, SCHEDULE_FILE, Record, Records, unit_of
from cankd_hf.compare.settings import BudgetConfig, ComparisonConfig
from cankd_hf.compare.tuning import Trial, best, trial_recipe, trials_of
from cankd_hf.config.recipe import Recipe
from cankd_hf.errors import InputError
from cankd_hf.names import ARM_FILE


class Planner:
    """Works out, from records, the runs of a comparison that can start now, and the outcomes so far.

    Args:
        config, arms, records: the comparison, its arms, and the records of finished runs.
    """

    def __init__(self, config: ComparisonConfig, arms: Mapping[str, Arm], records: Records) -> None:
        self.config, self.arms, self.records = config, dict(arms), records
        self.reference = reference_of(config, arms)
        self.failed: dict[str, str] = {}  # runs that failed in this session -> why
        self.outcomes: dict[tuple[str, str, int], Outcome] = {}
        self.tuned: dict[str, Trial] = {}
        self._untuned: dict[str, str] = {}
        self._todo: dict[str, Run] = {}
        self._keys: dict[Any, tuple[str, Recipe]] = {}
        self._prices: dict[str, Prices] = {}
        for budget in config.budgets:
            self._check_budget(budget)
        if config.charge_teacher and any(arm.distils and not arm.teachers for arm in arms.values()):
            raise InputError(
                "charge_teacher: what it cost to train a teacher is known only where the comparison trains it; name "
                "its recipe in `teacher:`, or leave this out"
            )

    def _check_budget(self, budget: BudgetConfig) -> None:
        if budget.cost is None:
            return
        if self.steps_of(budget) < 1:
            raise InputError(
                f"budgets: the cost of {budget.cost} needs its number of steps; write `at`, or set training.max_steps "
                "under `recipe:`"
            )

    def steps_of(self, budget: BudgetConfig) -> int:
        """Steps of the arm whose cost is a budget; -1 where they are open."""
        assert budget.cost is not None
        return budget.at or int(self.arms[budget.cost].recipe.training.get("max_steps", -1))

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """The costs of a step of each arm, see `calibrate`; empty before they were measured."""
        return self.records.load(CALIBRATION_FILE)

    @property
    def uncalibrated(self) -> dict[str, str]:
        """Arms whose cost could not be measured, and why."""
        return dict(self.calibration.get("failed", {}))

    @cached_property
    def _schedule(self) -> dict[str, Any]:
        """Place -> `steps` of each try, and the `code` that they were planned for."""
        return self.records.load(SCHEDULE_FILE)

    @property
    def budgets(self) -> list[BudgetConfig]:
        """The budgets; a verdict needs no distillation at equal cost, so that one is added where none is of cost."""
        given, own = list(self.config.budgets), [arm for arm in self.arms.values() if not arm.follows]
        distilling = [arm for arm in own if arm.distils]
        alone = next((arm.name for arm in own if not arm.distils), None)
        judged = self.config.judged
        there = any(one.cost is not None for one in given)
        if judged is None or not judged.equal_cost or there or not distilling or alone is None:
            return given
        main = next((arm for arm in distilling if arm.control != NO_BLOCK), distilling[0])
        if main.recipe.training.get("max_steps", -1) < 1:
            raise InputError("verdict: no distillation at equal cost needs training.max_steps; set it under `recipe:`")
        return [*given, BudgetConfig(cost=main.name, arms=[main.name, alone])]

    def prices_of(self, budget: BudgetConfig) -> Prices | None:
        """Costs by the file that a budget names, see `read_prices`; None where each run's is measured."""
        if budget.prices is not None and budget.label not in self._prices:
            own = {arm.name: arm for arm in self.arms.values() if not arm.follows and self.takes_part(arm, budget)}
            self._prices[budget.label] = read_prices(budget.prices, own, self.records)
        return self._prices.get(budget.label)

    # Runs

    def sweep(self) -> list[Run]:
        """Brings `outcomes` up to date and returns the runs that can start now; empty at the end."""
        self._todo, self.outcomes, self._untuned = {}, {}, {}
        ready = [arm for arm in self.arms.values() if self._tune(arm)]
        seeds = self.config.all_seeds
        first = seeds if self.config.screen is None else seeds[: self.config.screen.seeds]
        own = [arm for arm in ready if not arm.follows]
        self._seeds(own, first)
        finalists = self.finalists
        if finalists is None:
            return list(self._todo.values())
        self._seeds([arm for arm in own if arm.name in finalists], seeds)
        self._seeds([arm for arm in ready if arm.follows in finalists], seeds)
        return list(self._todo.values())

    @property
    def unfinished(self) -> bool:
        """Whether anything is still to be run, as far as it did not fail."""
        return bool(self._todo) or any(one.record is None and not one.failed for one in self.outcomes.values())

    def _seeds(self, arms: list[Arm], seeds: list[int]) -> None:
        # Runs of one seed follow each other: what changes in the machine meanwhile changes all arms.
        for seed in seeds:
            for budget in self.budgets:
                for arm in arms:
                    if self.takes_part(arm, budget):
                        self.outcome(arm.name, budget, seed)

    def takes_part(self, arm: Arm, budget: BudgetConfig) -> bool:
        """Whether an arm has a budget; the reference, which all are compared with, has every one."""
        leader = arm.follows or arm.name
        return budget.arms is None or leader in budget.arms or leader == self.reference

    @property
    def finalists(self) -> set[str] | None:
        """The arms that get all seeds, the best by their validation scores; None while the screening is not over."""
        screen = self.config.screen
        names = [arm.name for arm in self.arms.values() if not arm.follows]
        if screen is None:
            return set(names)
        seeds = self.config.all_seeds[: screen.seeds]
        gains: dict[str, list[float]] = {name: [] for name in names}
        for budget in self.budgets:
            for name in names:
                if not self.takes_part(self.arms[name], budget):
                    continue
                for seed in seeds:
                    one, other = (self.outcomes.get((n, budget.label, seed)) for n in (name, self.reference))
                    if one is None or other is None or not (one.record or one.failed):
                        return None
                    if one.record is None or other.record is None:
                        continue
                    found, against = one.record.validation, other.record.validation
                    if found is not None and against is not None:
                        sign = 1 if one.record.greater_is_better else -1
                        gains[name].append(sign * (found - against))
        rivals = [name for name in names if name not in self.kept and gains[name]]
        rivals.sort(key=lambda name: -statistics.fmean(gains[name]))
        return self.kept | set(rivals[: screen.keep])

    @property
    def kept(self) -> set[str]:
        """Arms that no screening drops: the reference, the control without a block, those whose cost is a budget."""
        costing = {budget.cost for budget in self.budgets if budget.cost is not None}
        return costing | {self.reference} | {name for name, arm in self.arms.items() if arm.control == NO_BLOCK}

    def _key(self, arm: str, seed: int, steps: int) -> tuple[str, Recipe]:
        trial = self.tuned.get(self.arms[arm].follows or arm)
        if (arm, seed, steps, trial) not in self._keys:
            recipe = self.arms[arm].at(seed, steps)
            recipe = recipe if trial is None else trial.of(recipe)
            self._keys[arm, seed, steps, trial] = self.records.key(recipe), recipe
        return self._keys[arm, seed, steps, trial]

    def _want(
        self, name: str, key: str, recipe: Recipe, teachers: tuple[TeacherRun, ...], cost: bool = False
    ) -> tuple[Record | None, str]:
        """The record of a run, or why it failed; a run that can start, or its teacher's, is put on the list.

        Where its `cost` counts, one that shared its device is run again.
        """
        if (found := self.records.find(key)) is not None and not (cost and found.beside):
            return found, ""
        for teacher in teachers:
            if teacher.key in self.failed:
                return None, f"its teacher was not trained: {self.failed[teacher.key]}"
            if not self.trained(teacher):
                self._todo.setdefault(teacher.key, Run(teacher.key, teacher.name, teacher.recipe))
                return None, ""
        if key in self.failed:
            return None, self.failed[key]
        self._todo.setdefault(key, Run(key, name, recipe))
        return None, ""

    def trained(self, teacher: TeacherRun) -> bool:
        """Whether the model of a teacher that the comparison trains is in its folder."""
        folder = self.records.runs / teacher.key
        return self.records.find(teacher.key) is not None and (folder / ARM_FILE).is_file()

    # Tuning

    def _tune(self, arm: Arm) -> bool:
        """Whether the trials of an arm are over; the best is in `tuned`."""
        if self.config.tuning is None:
            return True
        if arm.follows:
            return arm.follows in self.tuned or arm.follows in self._untuned
        trials = trials_of(self.config.tuning, arm)
        found: list[tuple[float | None, Record | None, str]] = []
        waiting = False
        for number, trial in enumerate(trials):
            if ("trial", arm.name, trial) not in self._keys:
                recipe = trial_recipe(self.config, arm, trial)
                self._keys["trial", arm.name, trial] = self.records.key(recipe), recipe
            key, recipe = self._keys["trial", arm.name, trial]
            record, failed = self._want(f"{arm.name}, trial {number + 1} of {len(trials)}", key, recipe, arm.teachers)
            waiting |= record is None and not failed
            found.append((record.score if record is not None else None, record, failed))
        if waiting:
            return False
        direction = next((record.greater_is_better for _, record, _ in found if record is not None), True)
        chosen = best(trials, [score for score, *_ in found], direction)
        if chosen is None:
            why = next((f": {reason}" for _, _, reason in found if reason), "")
            self._untuned[arm.name] = f"none of its {len(trials)} trials has a score{why}"
        else:
            self.tuned[arm.name] = chosen
        return True

    # Budgets

    def outcome(self, arm: str, budget: BudgetConfig, seed: int) -> Outcome:
        """What an arm reached with a budget and seed so far; its next run is put on the list."""
        place = (arm, budget.label, seed)
        if place not in self.outcomes:
            self.outcomes[place] = Outcome()
            self.outcomes[place] = self._outcome(arm, budget, seed)
        return self.outcomes[place]

    def _outcome(self, arm: str, budget: BudgetConfig, seed: int) -> Outcome:
        name, leader = f"{arm}, {budget.label}, seed {seed}", self.arms[arm].follows or arm
        if leader in self._untuned:
            return Outcome(failed=self._untuned[leader])
        if self.config.tuning is not None and leader not in self.tuned:
            return Outcome()
        if (prices := self.prices_of(budget)) is not None:
            return self._priced(arm, name, seed, budget, prices)
        if self.arms[arm].follows:  # as many steps as the arm it is compared with
            original = self.outcome(self.arms[arm].follows, budget, seed)
            if original.record is None:
                return Outcome(failed=original.failed and f"{self.arms[arm].follows} failed")
            return self._ran(arm, name, seed, original.record.steps)
        if budget.steps is not None:
            return self._ran(arm, name, seed, budget.steps)
        if arm == budget.cost:
            made = self._ran(arm, name, seed, self.steps_of(budget), cost=True)
            return replace(made, budget=made.charged if made.record is not None else None)
        given = self.outcome(budget.cost or "", budget, seed)
        if given.record is None:
            return Outcome(failed=given.failed and f"{budget.cost}, whose cost is the budget, failed")
        return self._within(arm, name, seed, budget, given)

    def _ran(self, arm: str, name: str, seed: int, steps: int, cost: bool = False) -> Outcome:
        key, recipe = self._key(arm, seed, steps)
        record, failed = self._want(name, key, recipe, self.arms[arm].teachers, cost)
        charged = 0.0 if record is None else record.spent + self._teaching(arm)
        return Outcome(record, charged=charged, tried=int(record is not None), failed=failed)

    def _priced(self, arm: str, name: str, seed: int, budget: BudgetConfig, prices: Prices) -> Outcome:
        """The run of the steps that a budget buys at known prices."""
        leader = self.arms[arm].follows or arm
        may = prices.cost(budget.cost or "", self.steps_of(budget))
        if (steps := prices.steps(leader, may)) < len(self.arms[leader].recipe.phases or (1,)):
            return Outcome(budget=may, failed=f"{steps} steps are left of {may:.0f} seconds")
        return replace(self._ran(arm, name, seed, steps), budget=may, charged=prices.cost(leader, steps))

    def _within(self, arm: str, name: str, seed: int, budget: BudgetConfig, given: Outcome) -> Outcome:
        """The run whose real cost is the budget's; each try that misses it corrects the steps of the next."""
        assert given.record is not None
        may, teaching = given.charged, self._teaching(arm)
        if teaching >= may:
            return Outcome(budget=may, failed=f"training its teacher alone costs {teaching:.0f} of {may:.0f} seconds")
        planned = self._planned(arm, name, budget, seed)
        made: list[Outcome] = []
        for attempt in range(self.config.attempts):
            steps = self._steps(planned, attempt, made, arm, budget, given, may - teaching)
            if steps is None:
                break
            one = replace(self._ran(arm, _try(name, attempt), seed, steps, cost=True), budget=may)
            if one.record is None:
                return one if one.failed or not made else replace(one, tried=len(made))
            if one.record.before >= may - teaching:
                spent = f"{', '.join(one.record.prepaid)} alone cost {one.record.before:.0f} of {may:.0f} seconds"
                return Outcome(budget=may, failed=spent)
            made.append(one)
            if not one.off(self.config.tolerance):
                break
        if not made:
            wrong = self.uncalibrated.get(arm) or self.uncalibrated.get(budget.cost or "")
            return Outcome(budget=may, failed=f"what a step costs could not be measured: {wrong}" if wrong else "")
        nearest = min(made, key=lambda one: abs(one.charged - may))
        return replace(nearest, tried=len(made))

    def _planned(self, arm: str, name: str, budget: BudgetConfig, seed: int) -> list[int]:
        """Steps of the tries of a place, as they were written down when each was first planned.

        Where nothing was written, they are those of the runs of this name and recipe that there are.
        """
        place = self._place(arm, budget, seed)
        entry = self._schedule.get(place, {})
        if entry.get("code") != code_hash() and not (entry and self.records.any_code):
            made: list[int] = []
            while (one := self.records.called(_try(name, len(made)))) is not None:
                if self.records.find(self._key(arm, seed, one.steps)[0]) is None:
                    break
                made.append(one.steps)
            self._schedule[place] = entry = {"steps": made, "code": code_hash()}
        found: list[int] = entry["steps"]
        return found

    def _steps(
        self,
        planned: list[int],
        attempt: int,
        made: list[Outcome],
        arm: str,
        budget: BudgetConfig,
        given: Outcome,
        may: float,
    ) -> int | None:
        """Steps of a try; None for no further one."""
        if attempt < len(planned):
            return planned[attempt]
        if made:
            last = made[-1].record
            assert last is not None
            step, setup = last.step, last.setup
        else:
            assert given.record is not None
            if (expected := self._expected(arm, budget, given)) is None:
                return None
            step, setup = expected
        least = max(1, len(self.arms[arm].recipe.phases or ()))
        steps = max(least, 1 + round((may - setup) / step)) if step > 0 else least
        if steps in planned:
            return None  # it would be the same run
        planned.append(steps)
        self.records.save(SCHEDULE_FILE, self._schedule)
        return steps

    def _expected(self, arm: str, budget: BudgetConfig, given: Outcome) -> tuple[float, float] | None:
        """Cost of a step of an arm, and of what it spends once, from those of the arm whose cost is the budget.

        The ratios are those of earlier seeds, else a step's is calibrated and the rest is taken as equal; what was
        spent before a run, which no other arm need have, is in the latter only where it is known.
        """
        assert given.record is not None
        ratios = []
        for seed in self.config.all_seeds:
            one, other = (self.outcomes.get((name, budget.label, seed)) for name in (arm, budget.cost or ""))
            if one is None or other is None or one.record is None or other.record is None or other is given:
                continue
            if other.record.step > 0:
                setup = one.record.setup - other.record.setup
                ratios.append((one.record.step / other.record.step, setup))
        if ratios:
            step, more = (statistics.median(values) for values in zip(*ratios, strict=True))
            return step * given.record.step, max(0.0, given.record.setup + more)
        costs = self.calibration.get("arms", {})
        if arm not in costs or budget.cost not in costs:
            return None
        unit = unit_of(costs[arm], self.records.by_clock)
        ratio = float(costs[arm][unit]) / float(costs[budget.cost][unit])
        return ratio * given.record.step, given.record.setup - given.record.before + self._prepaid(arm)

    def _prepaid(self, arm: str) -> float:
        """Seconds that the other runs of an arm found spent before them; before there are any, by the calibration."""
        found = [one.record.before for (name, _, _), one in self.outcomes.items() if name == arm and one.record]
        before = self.calibration.get("before", {}).get(arm, {})
        return max(found, default=float(before.get(unit_of(before, self.records.by_clock), 0.0)))

    def _place(self, arm: str, budget: BudgetConfig, seed: int) -> str:
        """The name of a place in the schedule; other settings of the arms have another one."""
        keys = [self.records.plain[self._key(name, seed, 1)[0]] for name in (arm, budget.cost or "")]
        return hashlib.sha256(json.dumps([*keys, budget.label, seed]).encode()).hexdigest()[:16]

    def _teaching(self, arm: str) -> float:
        """Seconds of training its teacher that are charged to an arm."""
        own = self.arms[self.arms[arm].follows or arm]
        return self.taught(own) if self.config.charge_teacher and own.distils else 0.0

    def taught(self, arm: Arm) -> float:
        """Seconds that training the teachers of an arm took, as far as the comparison trained them."""
        found = [self.records.find(teacher.key) for teacher in arm.teachers]
        return sum(record.spent for record in found if record is not None)


def _try(name: str, attempt: int) -> str:
    """The name of a further try of a run."""
    return f"{name}, try {attempt + 1}" if attempt else name
