"""95% intervals over the images of a test set, by bootstrap; differences between models are paired by image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

REPEATS = 2000
Score = Callable[[np.ndarray], float]  # of statistics summed over images


def resampled(statistics: np.ndarray, score: Score, seed: int) -> np.ndarray:
    """The score of each of 2000 draws of as many images with replacement.

    Args:
        statistics: `[N, ...]`, what each image adds.
        score: of a sum of these.
        seed: of the draws: equal for models that are compared.
    """
    draw = np.random.default_rng(seed)
    counts = draw.multinomial(len(statistics), np.full(len(statistics), 1 / len(statistics)), REPEATS)
    sums = np.tensordot(counts, statistics, axes=(1, 0))
    return np.array([score(one) for one in sums])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95% of resampled scores."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)
