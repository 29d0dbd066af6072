"""Training curves from a run's log history, and the warning signs in them."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cankd_hf.figures.draw import FONT, NAMES_AS_THEY_ARE
from cankd_hf.names import ALONE, DISTILLED

History = Sequence[Mapping[str, Any]]
_STYLES = ("-", "--", ":", "-.")
FELL = 0.15  # relative fall from which a loss counts as learnt
MOVED = 0.03  # rise from which raw similarity, in -1..1, counts as changed
LARGE_BRANCH = 0.5
WORSE = 0.02  # relative distance that the last score may have from the best one


def series(history: History, key: str) -> list[tuple[float, float]]:
    """(step, value) of everything logged under a key."""
    return [(entry["step"], entry[key]) for entry in history if isinstance(entry.get(key), (int, float))]


def keys_with(history: History, prefix: str) -> list[str]:
    """Logged names with this prefix, in the order of their first appearance."""
    return list(dict.fromkeys(key for entry in history for key in entry if key.startswith(prefix)))


def borders(history: History) -> list[tuple[float, str]]:
    """(step before it, name) of each phase after the first."""
    found: list[tuple[float, str]] = []
    for before, entry in pairwise(history):
        if entry.get("phase") != before.get("phase"):
            found.append((before["step"], str(entry.get("phase"))))
    return found


def loss_keys(history: History) -> list[str]:
    """Names of the distillation losses: of a term with several pairs those of the pairs, without their sum."""
    names = [key for key in keys_with(history, "loss_") if key != "loss_task"]
    split = {key.split("/")[0] for key in names if "/" in key}
    return [key for key in names if key not in split]


@rc_context(NAMES_AS_THEY_ARE)
def training_curves(histories: Mapping[str, History], metric: str) -> Figure | None:
    """Losses, raw similarity, shares of branch and gradient, score and learning rate over the steps; None without any.

    Args:
        histories: name of each arm -> its `log_history`; the first is the distilled student, drawn in all detail.
        metric: the task's score, logged as `eval_METRIC`.
    """
    main = next(iter(histories.values()))
    blocks: list[tuple[str, str, list[str], bool]] = [
        ("total loss", "", ["loss"], True),
        ("task loss", "loss_task", ["loss_task"], True),
        ("distillation losses, unweighted", "loss_", loss_keys(main), False),
        ("raw correlation with the teacher", "raw_correlation/", keys_with(main, "raw_correlation/"), False),
        ("raw CKA with the teacher", "raw_cka/", keys_with(main, "raw_cka/"), False),
        ("share of the Can branch, |output| / |student|", "branch_share/", keys_with(main, "branch_share/"), False),
        ("share of the gradient at the taps", "gradient_share/", keys_with(main, "gradient_share/"), False),
        (f"validation {metric}", "", [f"eval_{metric}"], True),
        ("learning rate", "", ["learning_rate"], True),
    ]
    drawn = [(block, lines) for block in blocks if (lines := _lines(histories, *block[1:]))]
    if not drawn:
        return None
    rows = -(-len(drawn) // 2)
    figure = Figure(figsize=(10.5, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for axis, (block, lines) in zip(axes.flat, drawn, strict=False):
        _draw(axis, block[0], lines, styled=block[3])
        for border, name in borders(main):
            axis.axvline(border, color="gray", linewidth=0.8, linestyle=":")
            axis.annotate(name, (border, 0.98), xycoords=("data", "axes fraction"), fontsize=FONT - 2, va="top")
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    return figure


def _lines(
    histories: Mapping[str, History], prefix: str, keys: Sequence[str], all_arms: bool
) -> list[tuple[str, list[tuple[float, float]]]]:
    """(legend, points) of a panel's lines: one key of every arm, or all keys of the distilled student."""
    if all_arms:
        found = [(name, series(history, key)) for name, history in histories.items() for key in keys]
    else:
        found = [(key.removeprefix(prefix), series(next(iter(histories.values())), key)) for key in keys]
    return [(name, points) for name, points in found if points]


def _draw(axis: Any, title: str, lines: list[tuple[str, list[tuple[float, float]]]], styled: bool) -> None:
    """One panel: terms differ by line style, levels by colour; arms by both (`styled`), as they often coincide."""
    groups = list(dict.fromkeys(name.rpartition("/")[0] for name, _ in lines))
    levels = list(dict.fromkeys(name.rpartition("/")[2] for name, _ in lines))
    colours = matplotlib.colormaps["viridis"]([0.8 * i / max(len(levels) - 1, 1) for i in range(len(levels))])
    for name, points in lines:
        group, _, level = name.rpartition("/")
        style = levels.index(level) if styled else groups.index(group)
        axis.plot(
            *zip(*points, strict=True),
            color=colours[levels.index(level)],
            linestyle=_STYLES[style % len(_STYLES)],
            marker="o" if len(points) < 12 else None,
            markersize=3,
            linewidth=1.5,
        )
    axis.set_title(title, fontsize=FONT + 1, loc="left")
    axis.tick_params(labelsize=FONT - 1)
    axis.set_xlabel("step", fontsize=FONT - 1)
    axis.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    handles = [
        Line2D([], [], color=colours[index], linestyle=_STYLES[index % len(_STYLES)] if styled else "-", label=level)
        for index, level in enumerate(levels)
    ]
    if len(groups) > 1:  # one entry per level and per term instead of per line
        handles += [
            Line2D([], [], color="gray", linestyle=_STYLES[index % len(_STYLES)], label=group)
            for index, group in enumerate(groups)
        ]
    if len(lines) > 1:
        axis.legend(handles=handles, fontsize=FONT - 2, frameon=False, ncols=1 + (len(groups) > 1), handlelength=2.4)


def warning_signs(
    history: History,
    metric: str,
    scores: Mapping[str, Mapping[str, Any]] | None = None,
    greater_is_better: bool = True,
    keeps_best: bool = False,
) -> list[str]:
    """Warnings about a run, one sentence each.

    Args:
        history: `log_history` of the distilled student.
        metric: the task's score.
        scores: scores of each arm of the run by name (`student alone`, `student distilled`), as far as measured.
        greater_is_better: the direction of the score.
        keeps_best: whether the run kept its best checkpoint, with `load_best_model_at_end`.
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
    losses = [(entry["step"], entry.get("loss", 0.0)) for entry in history]
    broken = [step for step, loss in losses if loss is None or not math.isfinite(loss)]  # None: read from JSON
    if broken:
        found.append(f"The loss was not a number at step {broken[0]}: nothing after it means anything.")
    points = series(history, f"eval_{metric}")
    if len(points) > 1:
        best, last = max(points, key=lambda point: sign * point[1]), points[-1]
        if not keeps_best and sign * last[1] < sign * best[1] * (1 - sign * WORSE):
            found.append(
                f"Validation {metric} was best at step {best[0]:g} ({best[1]:.4f}) and ends at {last[1]:.4f}; "
                "`load_best_model_at_end: true` keeps the best."
            )
    alone, distilled = ((scores or {}).get(name, {}).get(metric) for name in (ALONE, DISTILLED))
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
    block = keys_with(history, f"branch_share/{name.partition('/')[0]}/")
    learnt = "The block or the connector learnt" if block else "The connector learnt"
    fix = "compare with the control `loss: instance_mse`" if block else "try a lower training.learning_rate"
    text = " and ".join(f"raw {kind} only went from {end[0]:.2f} to {end[1]:.2f}" for kind, end in known.items())
    return [
        f"{name}: the loss fell by {1 - loss[1] / loss[0]:.0%} while {text}. {learnt}, not the student (the "
        f"shortcut): {fix}."
    ]
