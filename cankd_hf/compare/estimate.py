"""How long what is left of a comparison will take, from the calibrated costs of a step."""

from dataclasses import dataclass, field

from cankd_hf.compare.arms import Arm
from cankd_hf.compare.planning import Planner
from cankd_hf.compare.records import unit_of
from cankd_hf.compare.settings import BudgetConfig
from cankd_hf.compare.tuning import trials_of

_START = 15.0  # seconds until a process has imported and opened everything, where they were not measured


@dataclass
class Plan:
    """What is left to run: a line for each part, the number of runs, and seconds one by one."""

    lines: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0.0

    def add(self, what: str, count: int, seconds: float) -> None:
        """Adds a number of runs of so many seconds each."""
        if count:
            runs = "1 run" if count == 1 else f"{count} runs"
            self.lines.append(f"{what}: {runs} of {max(seconds, 6.0) / 60:.1f} min")
            self.runs, self.seconds = self.runs + count, self.seconds + count * seconds


def estimate(planner: Planner) -> Plan:
    """The plan of what has no record yet. Runs that miss their budget, and are run again, are not in it."""
    plan, costs = Plan(), planner.calibration
    known = costs.get("arms", {})
    wall = {name: float(cost[unit_of(cost, by_clock=True)]) for name, cost in known.items()}
    start = float(costs.get("start", _START))
    teachers = {run.key: run for arm in planner.arms.values() for run in arm.teachers}
    for run in teachers.values():
        if not planner.trained(run):
            steps = run.recipe.training.get("max_steps", 0)
            plan.add(f"training of {run.name}", 1, start + steps * wall.get(f"training of {run.name}", 0.0))
    tuning = planner.config.tuning
    for arm in planner.arms.values():
        if tuning is not None and not arm.follows and arm.name not in planner.tuned:
            steps = tuning.steps or arm.recipe.training.get("max_steps", 0)
            seconds = start + steps * wall.get(arm.name, 0.0)
            plan.add(f"tuning of {arm.name}", len(trials_of(tuning, arm)), seconds)
    planned: set[tuple[str, float]] = set()
    for budget in planner.budgets:
        for arm in planner.arms.values():
            leader = planner.arms[arm.follows] if arm.follows else arm
            if (count := _left(planner, budget, arm, leader)) == 0:
                continue
            steps = _steps(planner, budget, leader)
            if (arm.name, steps) not in planned:  # equal runs of two budgets are one
                planned.add((arm.name, steps))
                seconds = start + steps * wall.get(leader.name, 0.0)
                evaluated = (planner.config.curve + 1) * float(costs.get("evaluation", 0.0))
                plan.add(f"{arm.name}, {budget.label}", count, seconds + evaluated)
    if planner.config.screen is not None and planner.finalists is None:
        left, keep = len(planner.config.all_seeds) - planner.config.screen.seeds, planner.config.screen.keep
        plan.lines.append(f"(and {left} more seeds of the best {keep} of the other arms, with their controls)")
    return plan


def _left(planner: Planner, budget: BudgetConfig, arm: Arm, leader: Arm) -> int:
    """Number of runs without a record."""
    if not planner.takes_part(arm, budget):
        return 0
    seeds, screen = planner.config.all_seeds, planner.config.screen
    if screen is not None and leader.name not in (planner.finalists or planner.kept):
        seeds = [] if arm.follows else seeds[: screen.seeds]
    outcomes = (planner.outcomes.get((arm.name, budget.label, seed)) for seed in seeds)
    return sum(1 for one in outcomes if one is None or (one.record is None and not one.failed))


def _steps(planner: Planner, budget: BudgetConfig, arm: Arm) -> float:
    """Steps of a run, by the calibration."""
    if budget.steps is not None:
        return float(budget.steps)
    assert budget.cost is not None
    steps = float(planner.steps_of(budget))
    if (prices := planner.prices_of(budget)) is not None:
        return float(prices.steps(arm.name, prices.cost(budget.cost, steps)))
    own, given = (planner.calibration.get("arms", {}).get(name, {}) for name in (arm.name, budget.cost))
    unit = unit_of(own, planner.records.by_clock)
    return steps * given[unit] / own[unit] if given and own.get(unit) else steps
