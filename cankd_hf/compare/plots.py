"""The figures of a comparison: differences with their intervals, and learning curves over cost."""

import math

import matplotlib
from matplotlib import rc_context
from matplotlib.figure import Figure

from cankd_hf.compare.verdict import Findings
from cankd_hf.figures.draw import FONT, NAMES_AS_THEY_ARE

_STYLES = ("-", "--", ":", "-.")


@rc_context(NAMES_AS_THEY_ARE)
def difference_plot(findings: Findings, threshold: float) -> Figure | None:
    """One panel a budget, one line an arm: mean difference with its paired-t interval, and thin its bootstrap."""
    drawn = [
        (table, gains)
        for table in findings.tables
        if (gains := [row for row in table.rows if row.gain is not None and row.gain.pairs])
    ]
    if not drawn:
        return None
    most = max(len(gains) for _, gains in drawn)
    figure = Figure(figsize=(10.5, (0.42 * most + 1.3) * len(drawn)), layout="constrained")
    for axis, (table, gains) in zip(figure.subplots(len(drawn), 1, squeeze=False).flat, drawn, strict=True):
        axis.axvspan(-threshold, threshold, color="0.9")
        axis.axvline(0, color="0.4", linewidth=1)
        for place, row in enumerate(gains):
            assert row.gain is not None
            colour = "0.6" if row.screened else "C0"
            if math.isfinite(row.gain.low):
                axis.plot([row.gain.boot_low, row.gain.boot_high], [place + 0.2] * 2, color=colour, linewidth=1)
                axis.plot([row.gain.low, row.gain.high], [place] * 2, color=colour, linewidth=3, alpha=0.6)
            axis.plot(row.gain.mean, place, "o", color=colour, fillstyle="none" if row.screened else "full")
        axis.set_yticks(range(len(gains)), [row.arm for row in gains], fontsize=FONT)
        axis.set_ylim(len(gains) - 0.5, -0.5)
        direction = "" if findings.greater_is_better else " (turned: right is better)"
        axis.set_xlabel(f"{findings.metric} minus that of {table.reference}{direction}", fontsize=FONT)
        axis.set_title(table.budget, fontsize=FONT + 1, loc="left")
    return figure


@rc_context(NAMES_AS_THEY_ARE)
def curve_plot(findings: Findings) -> Figure | None:
    """Learning curves over what was spent, means over seeds; None where nothing was evaluated in training."""
    drawn = [(table, [row for row in table.rows if row.curve]) for table in findings.tables]
    drawn = [(table, rows) for table, rows in drawn if rows]
    if not drawn:
        return None
    figure = Figure(figsize=(10.5, 3.6 * len(drawn)), layout="constrained")
    for axis, (table, rows) in zip(figure.subplots(len(drawn), 1, squeeze=False).flat, drawn, strict=True):
        colours = matplotlib.colormaps["viridis"]([0.9 * i / max(len(rows) - 1, 1) for i in range(len(rows))])
        for index, row in enumerate(rows):
            _, costs, scores = zip(*row.curve, strict=True)
            style = _STYLES[index % len(_STYLES)]
            axis.plot(costs, scores, style, marker=".", color=colours[index], label=row.arm)
        axis.set_xlim(left=0)
        axis.set_xlabel(f"{findings.unit.replace('_', ' ').replace('cpu', 'CPU')} spent in training", fontsize=FONT)
        axis.set_ylabel(f"validation {findings.metric}", fontsize=FONT)
        axis.set_title(table.budget, fontsize=FONT + 1, loc="left")
        axis.legend(fontsize=FONT - 2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
