"""The table at the end of a run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cankd_hf.commands import console as plain_console
from cankd_hf.durations import duration
from cankd_hf.hub.sections import ema_line
from cankd_hf.names import CARD_FILE, PICTURE_FILE, RECIPE_FILE, REPORT_FILE, RESULTS_FILE
from cankd_hf.tasks import TASKS

if TYPE_CHECKING:
    from cankd_hf.runs.record import Arm, Report


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the result table, the share of the gap closed, how to load the student, and last what was reached.

    On one process only.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    console = console or plain_console(110)
    table = Table(title=f"{report.task}, {report.split} split", title_justify="left")
    shown = _columns(report)
    table.add_column("model")
    for name in ("parameters", "steps", "seconds", *shown):
        table.add_column(name.replace("_", " "), justify="right")
    for arm in report.arms:
        scores = [f"{arm.scores[name]:.4f}" if name in arm.scores else "-" for name in shown]
        steps, seconds = (str(arm.steps), f"{arm.seconds:.0f}") if arm.steps else ("-", "-")
        table.add_row(arm.name + (" †" if arm.inherited else ""), f"{arm.parameters:,}", steps, seconds, *scores)
    console.print(table)
    for arm in report.arms:
        if arm.phases:
            console.print(phases_table(arm, report.metric))
    inherited = sorted({part for arm in report.arms for part in arm.inherited})
    if inherited:
        console.print(f"† starts with the teacher's weights in: {', '.join(inherited)}")
    for arm in report.arms:
        if arm.ema:
            console.print(f"{arm.name}: {ema_line(arm.ema)}", soft_wrap=True, highlight=False, markup=False)
        if arm.working.get("verdict"):
            line = f"Is it working? {arm.working['line']}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if arm.working.get("weights"):
            console.print(f"Weights: {arm.working['weights']}", soft_wrap=True, highlight=False, markup=False)
    for arm in report.arms:
        for name, spent in arm.prepaid.items():
            seconds = ", ".join(f"{value:.0f} {clock.replace('_', ' ')}" for clock, value in spent.items())
            console.print(f"Spent before on {name}, charged to {arm.name}: {seconds}", soft_wrap=True, markup=False)
    for finding in report.findings:
        console.print(f"Warning: {finding}", soft_wrap=True, highlight=False, markup=False)
    if line := report.gap_line():
        console.print(line)
    folder = Path(report.output_dir)
    if look := [str(folder / name) for name in (PICTURE_FILE, REPORT_FILE) if (folder / name).is_file()]:
        console.print(f"Look first: {', then '.join(look)}", soft_wrap=True)
    console.print("Load the student with:")
    console.print(_load_code(report), soft_wrap=True, highlight=False, markup=False)
    console.print(end_line(report), soft_wrap=True, highlight=False, markup=False)


def phases_table(arm: Arm, metric: str) -> Table:
    """The phases of an arm, one a row."""
    table = Table(title=f"phases of {arm.name}", title_justify="left")
    for index, name in enumerate(("phase", "steps", "cost", "task weight", "terms", "frozen", metric)):
        table.add_column(name, justify="left" if index in (0, 4, 5) else "right")
    for phase in arm.phases:
        share, score = phase["cost_share"], phase["scores"].get(metric)
        table.add_row(
            phase["name"],
            f"{phase['steps']} ({phase['steps'] / max(1, arm.steps):.0%})",
            "-" if share is None else f"{share:.0%}",
            f"{phase['task_weight']:g}",
            ", ".join(phase["terms"]) or "-",
            ", ".join(phase["frozen"]) or "-",
            "-" if score is None else f"{score:.4f}",
        )
    return table


def end_line(report: Report) -> str:
    """The last line: the score, steps and time of training, and the folder; unknown values are left out."""
    student, folder = report.arms[-1], Path(report.output_dir)
    names = [task.metrics[report.metric].short for task in TASKS.values() if report.metric in task.metrics]
    metric = next(filter(None, names), report.metric)
    score = student.scores.get(report.metric)
    reached = (
        "Trained" if score is None or math.isnan(score) else f"Reached {metric} {score:.3f} ({report.split}) after"
    )
    files = {"card": CARD_FILE, "results": RESULTS_FILE, "recipe": RECIPE_FILE}
    *first, last = [name for name, file in files.items() if (folder / file).is_file()] or ["nothing"]
    beside = f"{', '.join(first)} and {last}" if first else last
    steps = "1 step" if student.steps == 1 else f"{student.steps} steps"
    return f"{reached} {steps} in {duration(student.seconds)}; student: {folder}; {beside} beside it."


def _columns(report: Report) -> list[str]:
    scores = report.arms[-1].scores
    return [name for name in TASKS[report.task].metrics if isinstance(scores.get(name), float)]


def _load_code(report: Report) -> str:
    config = json.loads((Path(report.output_dir) / "config.json").read_text(encoding="utf-8"))
    lines = TASKS[report.task].quick_usage(config, report.output_dir)
    return "\n".join(f"  {line}".rstrip() for line in lines.splitlines())
