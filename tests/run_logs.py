"""Tables of runs of which only the log was kept: no records of the referee, so nothing is claimed in them.

A line of such a log is `62 s: COMPARISON: ARM, BUDGET, seed 1: 400 steps, 0.3205, ...`, or one of a
trial, `62 s: COMPARISON: ARM, trial 1 of 6: 200 steps, ...`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from cankd_hf.compare.settings import TuningConfig, load_comparison
from cankd_hf.compare.stats import paired
from cankd_hf.compare.tuning import trials_of
from cankd_hf.hub import escape

SEEDS = range(1, 6)
REFERENCE, NO_BLOCK = "alone", "instance_mse"
_LINE = re.compile(r"\d+ s: (\w+): ([^,:]+)(?:, (.+))?, (?:seed|trial) (\d+)(?: of \d+)?: (\d+) steps, ([\d.e-]+), .*")


class Run(NamedTuple):
    """Where a run stands: in no budget for a trial, whose number stands in place of the seed."""

    arm: str
    budget: str
    seed: int


Scores = dict[Run, tuple[int, float]]  # steps and score in percent


def scores_of(log: Path, comparison: str) -> Scores:
    """The runs of a comparison in a log."""
    lines = (_LINE.fullmatch(line) for line in log.read_text(encoding="utf-8").splitlines())
    found = [line for line in lines if line and line[1] == comparison]
    return {Run(line[2], line[3] or "", int(line[4])): (int(line[5]), 100 * float(line[6])) for line in found}


def logged(folder: Path, file: Path) -> str:
    """The tables of the runs of a comparison in `first.txt`, and how far equal runs of `second.txt` differ."""
    first = scores_of(folder / "first.txt", file.stem)
    config = load_comparison(str(file), ["recipe.data.path=."])
    arms = [*config.arms, f"{REFERENCE} (twin)"]
    budgets = sorted({run.budget for run in first if run.budget}, key=len)
    told = [table(budget, first, arms) for budget in budgets]
    if config.tuning is not None:
        told.append(trials(first, arms[:-1], config.tuning))
    return "\n\n".join([*told, again(folder, file)])


def of_arm(runs: Scores, arm: str, budget: str) -> dict[int, tuple[int, float]]:
    """The runs of an arm in a budget, by seed; the arm whose cost a budget is has its runs in that of its steps."""
    own = re.fullmatch(rf"cost of (\d+ steps) of {re.escape(arm)}(, priced)?", budget)
    budget = own[1] if own else budget
    return {run.seed: value for run, value in runs.items() if (run.arm, run.budget) == (arm, budget)}


def table(budget: str, runs: Scores, arms: Sequence[str]) -> str:
    """Scores of each arm by seed, with the paired differences from the student alone and from the control."""
    lines = [
        f"*{escape.text(budget)}*",
        "",
        "| arm | steps | mIoU by seed | mean | minus alone | minus instance_mse |",
    ]
    lines.append("|---|---:|---|---:|---|---|")
    for arm in arms:
        own = of_arm(runs, arm, budget)
        scores = {seed: score for seed, (_, score) in own.items()}
        steps = ", ".join(sorted({str(steps) for steps, _ in own.values()})) or "-"
        told = " ".join(f"{scores[seed]:.1f}" if seed in scores else "-" for seed in SEEDS)
        cells = [arm, steps, told, f"{np.mean(list(scores.values())):.1f}"]
        for other in (REFERENCE, NO_BLOCK):
            apart = other == arm or (other == NO_BLOCK and arm.startswith(REFERENCE))
            others = {seed: score for seed, (_, score) in of_arm(runs, other, budget).items()}
            cells.append("" if apart else difference(scores, others))
        lines.append(f"| {' | '.join(escape.text(cell) for cell in cells)} |")
    return "\n".join(lines)


def difference(scores: Mapping[int, float], others: Mapping[int, float]) -> str:
    """The mean paired difference with its 95% paired-t interval; the number of pairs where some are missing."""
    pairs = [scores[seed] - others[seed] for seed in SEEDS if seed in scores and seed in others]
    one = paired(pairs)
    few = "" if len(pairs) == len(SEEDS) else f", {len(pairs)} seeds"
    return f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]{few}"


def trials(runs: Scores, arms: Sequence[str], tuning: TuningConfig) -> str:
    """The score of each trial, in its order, and what the best one tried."""
    lines = [
        "*trials*",
        "",
        "| arm | mIoU of each trial | best: learning rate | weights times |",
        "|---|---|---:|---:|",
    ]
    for arm in arms:
        made: Any = SimpleNamespace(distils=arm != REFERENCE)
        scores = {number: score for number, (_, score) in of_arm(runs, arm, "").items()}
        best = trials_of(tuning, made)[max(scores, key=lambda number: scores[number]) - 1]
        told = " ".join(f"{scores[number]:.1f}" for number in sorted(scores))
        lines.append(f"| {escape.text(arm)} | {told} | {best.learning_rate:g} | {best.weight:g} |")
    return "\n".join(lines)


def again(folder: Path, file: Path) -> str:
    """How far runs of the same settings on two machines differ."""
    first, second = (scores_of(folder / name, file.stem) for name in ("first.txt", "second.txt"))
    common = [run for run in first if run in second and first[run][0] == second[run][0]]
    apart = np.array([second[run][1] - first[run][1] for run in common])
    spread, largest = apart.std(ddof=1), np.abs(apart).max()
    return (
        f"{len(common)} of the runs of {file.stem} were made again on a second machine of the same kind: second minus "
        f"first {apart.mean():+.1f} points on average, standard deviation {spread:.1f}, at most {largest:.1f}."
    )
