"""From the outcomes of a comparison to its tables, and to what may be claimed."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cankd_hf.compare.arms import NO_BLOCK, TWIN, UNTRAINED
from cankd_hf.compare.planning import Outcome, Planner
from cankd_hf.compare.settings import BudgetConfig
from cankd_hf.compare.stats import Interval, claims, paired

BETTER, WORSE, NONE = "better", "worse", "no difference shown"


@dataclass
class Row:
    """An arm at one budget.

    Attributes:
        arm: its name.
        control: what it is a control of, or "".
        scores: seed -> score; None where it has none.
        steps: seed -> optimizer steps.
        charged: seed -> seconds that count.
        tried: number of runs, those that missed the budget included.
        off: seed -> relative difference of what counts from the budget, where it is beyond the tolerance.
        failed: why runs have no score, each reason once.
        gain: paired difference from the reference, positive is better.
        claim: what may be said of it.
        screened: whether it was dropped after the first seeds.
        knowledge: paired difference from the same arm with an untrained teacher.
        block: paired difference from the control without a block.
        block_claim: what may be said of that.
        taught: seconds that training its teacher took, where that is known.
        curve: evaluations during its runs, means over seeds: steps, cost, score.
        made: seed -> by what code and where its run was made.
    """

    arm: str
    control: str
    scores: dict[int, float | None] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    charged: dict[int, float] = field(default_factory=dict)
    tried: int = 0
    off: dict[int, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    gain: Interval | None = None
    claim: str = ""
    screened: bool = False
    knowledge: Interval | None = None
    block: Interval | None = None
    block_claim: str = ""
    taught: float | None = None
    curve: list[tuple[float, float, float]] = field(default_factory=list)
    made: dict[int, str] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean score of the seeds that have one."""
        found = [score for score in self.scores.values() if score is not None]
        return statistics.fmean(found) if found else math.nan


@dataclass
class Table:
    """One budget: its arms, and whether the referee's own check of itself passed.

    Attributes:
        budget: name of the budget.
        reference: the arm that all are compared with.
        rows: the arms in the order of the comparison.
        twin: paired difference of two equal arms; None without a verdict.
        trusted: whether that contains 0 and the two really differ; None where it is not known.
        said: the verdict in sentences, one for each arm.
        unit: the clock of its costs.
    """

    budget: str
    reference: str
    rows: list[Row]
    twin: Interval | None = None
    trusted: bool | None = None
    said: list[str] = field(default_factory=list)
    unit: str = "cpu_seconds"


@dataclass
class Findings:
    """All that a comparison found.

    Attributes:
        metric: the score.
        split: what was scored.
        greater_is_better: its direction.
        unit: the clock of costs.
        tables: one for each budget.
    """

    metric: str
    split: str
    greater_is_better: bool
    unit: str
    tables: list[Table]


def judge(planner: Planner) -> Findings:
    """The tables of a comparison as far as it has been run."""
    records = [one.record for one in planner.outcomes.values() if one.record is not None]
    first = records[0] if records else None
    better = first.greater_is_better if first is not None else True
    unit = first.unit if first is not None else "cpu_seconds"
    tables = [_table(planner, budget, better, unit) for budget in planner.budgets]
    metric, split = (first.metric, first.split) if first is not None else ("score", "test")
    return Findings(metric, split, better, unit, tables)


def _table(planner: Planner, budget: BudgetConfig, better: bool, unit: str) -> Table:
    finalists, prices = planner.finalists, planner.prices_of(budget)
    rows = []
    for name, arm in planner.arms.items():
        outcomes = {
            seed: one for (n, label, seed), one in planner.outcomes.items() if n == name and label == budget.label
        }
        if not outcomes:
            continue
        row = _row(name, arm.control, outcomes, planner.config.tolerance)
        if prices is not None:
            leader = arm.follows or name
            row.curve = [(step, prices.cost(leader, step), score) for step, _, score in row.curve]
        row.screened = finalists is not None and not arm.follows and name not in finalists
        row.taught = planner.taught(arm) if arm.teachers else None
        rows.append(row)
    table = Table(budget.label, planner.reference, rows, unit=unit if prices is None else prices.unit)
    compare_rows(table, better, planner)
    return table


def _row(name: str, control: str, outcomes: dict[int, Outcome], tolerance: float) -> Row:
    row = Row(name, control)
    curves = []
    for seed, one in sorted(outcomes.items()):
        row.scores[seed] = None if one.record is None else one.record.score
        row.tried += one.tried
        if one.failed:
            row.failed = list(dict.fromkeys([*row.failed, one.failed]))
        if one.record is None:
            continue
        if one.record.score is None:
            row.failed = list(dict.fromkeys([*row.failed, "its score is not a number"]))
        row.steps[seed], row.charged[seed], row.made[seed] = one.record.steps, one.charged, one.record.made
        unit = one.record.unit
        curves.append([(point["step"], point[unit], point["score"]) for point in one.record.curve])
        if one.budget is not None and one.off(tolerance):
            row.off[seed] = one.charged / one.budget - 1
    count = min((len(curve) for curve in curves), default=0)
    for index in range(count):
        points = [curve[index] for curve in curves]
        row.curve.append(tuple(statistics.fmean(values) for values in zip(*points, strict=True)))  # type: ignore[arg-type]
    return row


def difference(row: Row, other: Row, better: bool) -> Interval:
    """The paired difference of two arms over the seeds that both have; positive where the first is better."""
    sign = 1 if better else -1
    return paired(
        [
            sign * (score - against)
            for seed, score in row.scores.items()
            if score is not None and (against := other.scores.get(seed)) is not None
        ]
    )


def compare_rows(table: Table, better: bool, planner: Planner) -> None:
    """Fills in differences, claims and sentences of a table."""
    judged = planner.config.judged
    by_name = {row.arm: row for row in table.rows}
    reference = by_name.get(table.reference)
    if reference is None:
        return
    for row in table.rows:
        if row is not reference and row.control != TWIN:
            row.gain = difference(row, reference, better)
    if judged is None:
        return
    _check_itself(table, by_name, better, planner)
    rivals = [row for row in table.rows if row.gain is not None and row.control != UNTRAINED]
    questions = [(row, "gain", "claim", reference) for row in rivals]
    plain = next((row for row in table.rows if row.control == NO_BLOCK), None)
    if plain is not None:
        compared = [row for row in rivals if row is not plain]
        for row in compared:
            row.block = difference(row, plain, better)
        questions += [(row, "block", "block_claim", plain) for row in compared]
    _claim(questions, judged.threshold, table.trusted, len(planner.config.all_seeds))
    for row in table.rows:
        if row.control == UNTRAINED and (trained := by_name.get(planner.arms[row.arm].follows)) is not None:
            trained.knowledge = difference(trained, row, better)
    table.said = list(_sentences(table, planner))


def _check_itself(table: Table, by_name: dict[str, Row], better: bool, planner: Planner) -> None:
    """Two equal arms: their interval must contain 0, and they must not be one and the same run."""
    twin = next((row for row in table.rows if row.control == TWIN), None)
    original = None if twin is None else by_name.get(planner.arms[twin.arm].follows)
    if twin is None or original is None:
        return
    table.twin = difference(twin, original, better)
    if table.twin.pairs == len(planner.config.all_seeds):
        differ = any(twin.scores[seed] != original.scores.get(seed) for seed in twin.scores)
        table.trusted = table.twin.holds(0.0) and differ


def _claim(questions: Sequence[tuple[Row, str, str, Row]], threshold: float, trusted: bool | None, seeds: int) -> None:
    """Writes what may be said of differences: Holm over all questions of the table, those of arms dropped by a
    screening too.

    Args:
        questions: row, name of the difference, name of what may be said of it, the row that it is compared with.
        threshold: smallest difference worth a claim.
        trusted: whether the check of two equal arms passed.
        seeds: number of pairs that a whole arm has.
    """
    whole = [
        (row, of, to)
        for row, of, to, other in questions
        if trusted
        and not (row.screened or row.made != other.made or any(one.failed or one.off for one in (row, other)))
        and getattr(row, of).pairs == seeds
    ]
    said = claims([getattr(row, of) for row, of, _ in whole], len(questions), threshold)
    for row, _, to, other in questions:
        setattr(row, to, _why_none(row, other, trusted))
    for (row, _, to), words in zip(whole, said, strict=True):
        setattr(row, to, words)


def _why_none(row: Row, other: Row, trusted: bool | None) -> str:
    if row.failed:
        return f"no claim: {row.failed[0]}"
    if row.screened:
        return "dropped by the screening"
    if row.off:
        return "no claim: off its budget"
    if other.failed or other.off:
        return f"no claim: {other.arm} {'failed' if other.failed else 'is off its budget'}"
    if any(row.made[seed] != other.made[seed] for seed in row.made.keys() & other.made.keys()):
        return f"no claim: runs of {other.arm} were made by other code, or elsewhere"
    return "no claim: two equal arms differ" if trusted is False else "no claim: not complete"


def interval_text(interval: Interval | None) -> str:
    """`+0.0123 [-0.0004, +0.0250]`."""
    if interval is None or not interval.pairs:
        return "-"
    if interval.pairs < 2:
        return f"{interval.mean:+.4f} (one pair)"
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _sentences(table: Table, planner: Planner) -> Iterable[str]:
    against = f"{table.reference} at {table.budget}"
    if table.twin is not None:
        wrong = "they do not differ at all" if table.twin.holds(0.0) else "they differ"
        words = {True: "passed", False: f"FAILED ({wrong}), so nothing is claimed", None: "not complete"}
        verdict = words[table.trusted]
        yield f"Self-check, two equal arms: {interval_text(table.twin)}: {verdict}."
    for row in table.rows:
        if row.gain is None or row.control == UNTRAINED:
            continue
        told = interval_text(row.gain)
        if row.claim == BETTER:
            yield f"{row.arm} is better than {against}: {told}, {row.gain.pairs} seeds. {_whose(row)}"
        elif row.claim == WORSE:
            yield f"{row.arm} is WORSE than {against}: {told}, {row.gain.pairs} seeds."
        elif row.claim == NONE:
            short = "" if row.gain.holds(0.0) else " Its interval leaves 0 out, but that is not enough for a claim."
            yield f"{row.arm} shows NO difference from {against}: {told}, {row.gain.pairs} seeds.{short}"
        else:
            yield f"{row.arm} against {against}: {told}; {row.claim}."
        judged = planner.config.judged
        if judged is not None and judged.margin is not None and row.gain.pairs == len(planner.config.all_seeds):
            least = f"{row.gain.low:+.4f} against -{judged.margin:g}"
            if row.gain.low > -judged.margin:
                yield f"{row.arm} is shown not to hurt: the lower end is {least}."
            else:
                yield f"{row.arm} is NOT shown to be harmless: the lower end is {least}."
        if row.block is not None and row.block_claim in (BETTER, WORSE, NONE):
            how = {BETTER: "adds to", WORSE: "is worse than", NONE: "is not shown to differ from"}[row.block_claim]
            yield f"{row.arm} {how} the control without a block: {interval_text(row.block)}."


def _whose(row: Row) -> str:
    if row.knowledge is None:
        return "No untrained teacher was run, so the gain is not shown to be the teacher's knowledge."
    told = interval_text(row.knowledge)
    if row.knowledge.low > 0 and row.gain is not None and row.knowledge.pairs == row.gain.pairs:
        return f"It is the teacher's knowledge: trained minus untrained teacher is {told}."
    return f"It is NOT shown to be the teacher's knowledge: trained minus untrained teacher is {told}."
