"""Training curves from a run's log history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cankd_hf.figures.draw import FONT

History = Sequence[Mapping[str, Any]]
_STYLES = ("-", "--", ":", "-.")


def series(history: History, key: str) -> list[tuple[float, float]]:
    """(step, value) of everything logged under a key."""
    return [(entry["step"], entry[key]) for entry in history if isinstance(entry.get(key), (int, float))]


def keys_with(history: History, prefix: str) -> list[str]:
    """Logged names with this prefix, in the order of their first appearance."""
    return list(dict.fromkeys(key for entry in history for key in entry if key.startswith(prefix)))


def loss_keys(history: History) -> list[str]:
    """Names of the distillation losses: of a term with several pairs those of the pairs, without their sum."""
    names = [key for key in keys_with(history, "loss_") if key != "loss_task"]
    split = {key.split("/")[0] for key in names if "/" in key}
    return [key for key in names if key not in split]


def training_curves(histories: Mapping[str, History], metric: str) -> Figure | None:
    """Losses, raw similarity, branch share, score and learning rate over the steps; None if nothing was logged.

    Args:
        histories: name of each arm -> its `log_history`; the first is the distilled student, drawn in all detail.
        metric: the task's score, logged as `eval_METRIC`.
    """
    main = next(iter(histories.values()))
    blocks: list[tuple[str, str, list[str], bool]] = [
        ("total loss", "", ["loss"], True),
        ("task loss", "loss_task", ["loss_task"], True),
        ("feature losses, unweighted", "loss_", loss_keys(main), False),
        ("raw correlation with the teacher", "raw_correlation/", keys_with(main, "raw_correlation/"), False),
        ("raw CKA with the teacher", "raw_cka/", keys_with(main, "raw_cka/"), False),
        ("share of the Can branch, |output| / |student|", "branch_share/", keys_with(main, "branch_share/"), False),
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
