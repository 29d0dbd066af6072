"""The checks of the arguments of `CanKDLoss` and of the maps it gets."""

import logging
from functools import cache

from cankd_hf.errors import InputError
from cankd_hf.losses.affinities import AFFINITIES

logger = logging.getLogger(__name__)


@cache
def warn_not_pooled(height: int, width: int) -> None:
    """Warns once for each size of maps that are too small to pool."""
    logger.warning(
        "CanKD: a map of size (%d, %d) cannot be pooled 2x2: its keys and values are not sub-sampled", height, width
    )


def check_options(hidden: int, affinity: str, output_norm: str | None, normalization: str | None, values: str) -> None:
    """Raises InputError for arguments that `CanKDLoss` does not know."""
    problems = []
    if hidden < 1:
        problems.append(f"CanKDLoss.hidden_channels: expected at least 1, got {hidden}; None takes half the channels")
    choices = (
        ("affinity", affinity, tuple(AFFINITIES)),
        ("output_norm", output_norm, ("batch", "none", None)),
        ("normalization", normalization, ("instance", "none", None)),
        ("values", values, ("teacher", "student")),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            names = ", ".join(str(name) for name in allowed if name)
            problems.append(f"CanKDLoss.{key}: expected one of {names}, got {value!r}; choose one of them")
    if problems:
        raise InputError(problems)
