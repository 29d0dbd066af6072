"""Warning signs in the numbers that a run logged: what a person would look for in the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cankd_hf.figures.curves import History, keys_with, loss_keys, series

FELL = 0.15  # relative fall from which a loss counts as learnt
MOVED = 0.03  # rise from which raw similarity, in -1..1, counts as changed
LARGE_BRANCH = 0.5
WORSE = 0.02  # relative distance that the last score may have from the best one


def warning_signs(
    history: History,
    metric: str,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    greater_is_better: bool = True,
) -> list[str]:
    """Warnings about a run, one sentence each.

    Args:
        history: `log_history` of the distilled student.
        metric: the task's score.
        scores: scores of each arm of the run by name (`student alone`, `student distilled`), as far as measured.
        greater_is_better: the direction of the score.
    """
    sign = 1 if greater_is_better else -1
    found = [sign for key in loss_keys(history) for sign in _of_term(history, key)]
    for key in keys_with(history, "branch_share/"):
        share = _ends(history, key)
        if share is not None and share[1] > LARGE_BRANCH:
            found.append(
                f"{key.removeprefix('branch_share/')}: the Can branch ends at {share[1]:.0%} of the student map, so a "
                "good part of what is compared with the teacher is the block's own output."
            )
    broken = [entry["step"] for entry in history if not math.isfinite(entry.get("loss", 0.0))]
    if broken:
        found.append(f"The loss was not a number at step {broken[0]}: nothing after it means anything.")
    found += _of_scores(history, metric, sign)
    alone, distilled = ((scores or {}).get(name, {}).get(metric) for name in ("student alone", "student distilled"))
    if alone is not None and distilled is not None and sign * distilled < sign * alone:
        found.append(
            f"The distilled student is worse than the student alone ({metric} {distilled:.4f} against {alone:.4f}): "
            "distillation did not help here."
        )
    return found


def _pair_of(history: History, key: str) -> str | None:
    """The pair whose raw similarity belongs to a loss; None if the logs do not show it."""
    term, _, pair = key.removeprefix("loss_").partition("/")
    if pair:
        return pair
    own = [name.rpartition("/")[2] for name in keys_with(history, f"branch_share/{term}/")]
    named = own or [name.rpartition("/")[2] for name in keys_with(history, "raw_correlation/")]
    return named[0] if len(named) == 1 else None


def _ends(history: History, key: str) -> tuple[float, float] | None:
    """Means of the first and of the last tenth of what was logged; None for fewer than four values."""
    values = [value for _, value in series(history, key) if math.isfinite(value)]
    if len(values) < 4:
        return None
    part = max(1, len(values) // 10)
    return sum(values[:part]) / part, sum(values[-part:]) / part


def _of_term(history: History, key: str) -> list[str]:
    loss, pair = _ends(history, key), _pair_of(history, key)
    if loss is None or pair is None:
        return []
    name = key.removeprefix("loss_")
    if loss == (0.0, 0.0):
        return [
            f"{name}: the loss was 0 from the start, so this pair teaches nothing. A map of one cell is 0 after "
            "instance normalisation: leave the pair out, or use larger images."
        ]
    if loss[1] > 0.98 * loss[0]:
        return [
            f"{name}: the loss did not fall ({loss[0]:.3g} to {loss[1]:.3g}). The student may be too small for this "
            "pair, or the pair or the weight is wrong."
        ]
    ends = {kind: _ends(history, f"raw_{kind}/{pair}") for kind in ("correlation", "cka")}
    known = {kind: end for kind, end in ends.items() if end is not None}
    if loss[1] > (1 - FELL) * loss[0] or not known or any(end[1] - end[0] >= MOVED for end in known.values()):
        return []
    text = " and ".join(f"raw {kind} only went from {end[0]:.2f} to {end[1]:.2f}" for kind, end in known.items())
    return [
        f"{name}: the loss fell by {1 - loss[1] / loss[0]:.0%} while {text}. The block or the connector learnt, not "
        "the student (the shortcut): compare with the control `loss: instance_mse`."
    ]


def _of_scores(history: History, metric: str, sign: int) -> list[str]:
    points = series(history, f"eval_{metric}")
    if len(points) < 2:
        return []
    best = max(points, key=lambda point: sign * point[1])
    if sign * points[-1][1] >= sign * best[1] * (1 - sign * WORSE):
        return []
    return [
        f"Validation {metric} was best at step {best[0]:g} ({best[1]:.4f}) and ends at {points[-1][1]:.4f}; "
        "`load_best_model_at_end: true` keeps the best."
    ]
