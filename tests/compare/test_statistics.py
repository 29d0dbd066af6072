"""Intervals and claims: against scipy, and against what chance alone would claim."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from cankd_hf.compare.arms import NO_BLOCK, TWIN, UNTRAINED
from cankd_hf.compare.settings import VerdictConfig
from cankd_hf.compare.stats import Interval, claims, holm, paired
from cankd_hf.compare.verdict import Row, Table, compare_rows


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    first, second = [0.31, 0.35, 0.30, 0.36, 0.33], [0.30, 0.32, 0.31, 0.31, 0.30]
    tested = stats.ttest_rel(first, second)
    found = paired([a - b for a, b in zip(first, second, strict=True)])
    ends = tested.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((ends.low, ends.high, tested.pvalue))
    assert found.low < found.boot_low < found.mean < found.boot_high < found.high and found.pairs == 5


def test_few_or_equal_differences_claim_nothing_they_do_not_show() -> None:
    for few in (paired([]), paired([0.3])):
        assert few.holds(0.0) and math.isnan(few.p) and claims([few]) == ["no difference shown"]
    same = paired([0.0, 0.0, 0.0])
    assert same.holds(0.0) and claims([same]) == ["no difference shown"]


def test_a_claim_needs_the_threshold_and_its_place_among_all_arms() -> None:
    clear = paired([0.030, 0.032, 0.031, 0.029])
    assert claims([clear]) == ["better"] and claims([clear], threshold=0.05) == ["no difference shown"]
    assert claims([paired([-0.030, -0.032, -0.031, -0.029])]) == ["worse"]
    weak = Interval(0.02, 0.001, 0.04, 0.04, 0.01, 0.03, 5)
    assert claims([weak]) == ["better"] and claims([weak], family=2) == ["no difference shown"]


def test_holm_goes_down_step_by_step() -> None:
    assert holm([0.04, 0.01, 0.02], 3) == [True, True, True]  # .05/3, .05/2, .05
    assert holm([0.04, 0.02, 0.03], 3) == [False, False, False]
    assert holm([0.04, 0.01, math.nan], 3) == [False, True, False]
    assert holm([0.02], 2) == [True] and holm([0.03], 2) == [False]  # the other one was never tested


@pytest.mark.parametrize(("arms", "seeds"), [(1, 5), (3, 5), (3, 3)])
def test_200_comparisons_without_a_true_difference_claim_2_to_8_percent(arms: int, seeds: int) -> None:
    random, false = np.random.default_rng(seeds), 0
    for _ in range(200):
        reference = random.normal(0, 1, seeds)
        found = [paired(list(random.normal(0, 1, seeds) - reference)) for _ in range(arms)]
        false += any(said != "no difference shown" for said in claims(found))
    assert 4 <= false <= 16, f"{false / 2:.1f}%"


def test_choosing_the_best_arms_by_the_first_seeds_makes_no_more_false_claims() -> None:
    random, false = np.random.default_rng(7), 0
    for _ in range(400):
        gains = random.normal(0, 1, (8, 5))
        best = np.argsort(-gains[:, :2].mean(axis=1))[:3]
        false += any(said == "better" for said in claims([paired(list(gains[arm])) for arm in best], family=8))
    assert false <= 32, f"{false / 4:.1f}%"


def test_200_tables_with_every_control_and_no_true_difference_claim_2_to_8_percent() -> None:
    random, false = np.random.default_rng(3), 0
    arms = {"alone": "reference", "a": "", "b": "", "plain": NO_BLOCK, "a random": UNTRAINED, "twin": TWIN}
    follows = {"a random": "a", "twin": "alone"}
    config = SimpleNamespace(judged=VerdictConfig(), all_seeds=[1, 2, 3, 4, 5])
    planner: Any = SimpleNamespace(
        config=config, arms={name: SimpleNamespace(follows=follows.get(name, "")) for name in arms}
    )
    for _ in range(200):
        made = [Row(name, control, dict(enumerate(random.normal(0, 1, 5)))) for name, control in arms.items()]
        table = Table("steps", "alone", made)
        compare_rows(table, True, planner)
        said = [words for row in made for words in (row.claim, row.block_claim)]
        false += "better" in said or "worse" in said
    assert 4 <= false <= 16, f"{false / 2:.1f}%"
