"""Paired differences of arms: means, intervals, and which of several may be claimed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 4999


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences with its intervals.

    Attributes:
        mean: mean difference.
        low: lower end of the paired-t interval, which decides; -inf for fewer than two pairs.
        high: its upper end.
        p: two-sided p-value of the paired t-test against 0; nan for fewer than two pairs.
        boot_low: lower end of the percentile bootstrap interval, which is only shown.
        boot_high: its upper end.
        pairs: number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    boot_low: float
    boot_high: float
    pairs: int

    def holds(self, value: float) -> bool:
        """Whether a value lies in the paired-t interval."""
        return self.low <= value <= self.high


def paired(differences: Sequence[float], level: float = LEVEL) -> Interval:
    """The interval of the mean of paired differences, one for each seed.

    Differences that are all equal give an interval of that one value; p is then 1 if it is 0, else 0.
    """
    values = np.asarray(differences, dtype=float)
    count = len(values)
    if count == 0:
        return Interval(math.nan, -math.inf, math.inf, math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if count == 1:
        return Interval(mean, -math.inf, math.inf, math.nan, math.nan, math.nan, 1)
    error = float(values.std(ddof=1)) / math.sqrt(count)
    if error <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean, float(abs(mean) <= 1e-12), mean, mean, count)
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1))
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    boot_low, boot_high = np.quantile(values[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, mean - half, mean + half, p, float(boot_low), float(boot_high), count)


def holm(p_values: Sequence[float], family: int, level: float = LEVEL) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects (Holm 1979), with a family-wise error of 1 - level.

    Args:
        p_values: of the hypotheses that were tested; nan: not testable.
        family: number of hypotheses that could have been tested. Arms that a screening dropped count: their p-values
            are taken as 1, so that choosing the best arms by some of the same seeds costs nothing in error.
        level: 1 - the family-wise error.

    Returns:
        One answer for each p-value.
    """
    rejected = [False] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda index: (math.isnan(p_values[index]), p_values[index]))
    for rank, index in enumerate(order):
        if not p_values[index] <= (1 - level) / max(family - rank, 1):
            break
        rejected[index] = True
    return rejected


def claims(
    intervals: Sequence[Interval], family: int | None = None, threshold: float = 0.0, level: float = LEVEL
) -> list[str]:
    """What may be said of several arms compared with one reference, each `better`, `worse` or `no difference shown`.

    A claim needs both: the p-value passes Holm's procedure over the family, and the 95% paired-t interval lies beyond
    0 and the threshold.

    Args:
        intervals: gains over the reference, positive is better.
        family: number of arms that were compared in all, those dropped by a screening included; default: these.
        threshold: smallest gain, or loss, worth a claim.
        level: of the intervals and of the family.
    """
    passed = holm([interval.p for interval in intervals], family or len(intervals), level)
    said = []
    for interval, rejected in zip(intervals, passed, strict=True):
        better, worse = interval.low > max(threshold, 0.0), interval.high < min(-threshold, 0.0)
        said.append("better" if rejected and better else "worse" if rejected and worse else "no difference shown")
    return said
