"""The table of what a run will take: time, memory and disk of each choice, in 80 columns."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cankd_hf.config.parts import spanning
from cankd_hf.config.recipe import Recipe
from cankd_hf.durations import duration
from cankd_hf.host import Host
from cankd_hf.runs.build import SCORE_ONLY, build_trainer
from cankd_hf.runs.forecast import WHOLE, Choice, Forecast, forecast, summed
from cankd_hf.runs.measured import measure, ready
from cankd_hf.tasks import TASKS

WIDTH = 80
# What no measured step can know.
UNKNOWN = (
    "Not counted: start and downloads, saving, pictures. Steps take longer where other programs keep cores busy, and "
    "on a laptop that gets warm."
)


def size_text(size: float) -> str:
    """Bytes as a person reads them: `12.3 MiB`, `4.56 GiB`."""
    if size >= 2**40:
        return f"{size / 2**40:.1f} TiB"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def print_plan(
    console: Console,
    parts: Sequence[tuple[str, Forecast]],
    extra: Sequence[Choice],
    total: Choice,
    out: str,
    host: Host,
) -> None:
    """Prints what each choice costs, what the recipe does in all, and what is not known.

    Args:
        console: where to.
        parts: (name, forecast) of each phase; of a run without phases one with an empty name.
        extra: what is trained beside: teachers.
        total: the whole recipe.
        out: folder of the run, on whose disk it writes.
        host: what other programs used when it was measured.
    """
    forecasts = [part for _, part in parts]
    steps, first = sum(part.steps for part in forecasts), forecasts[0].measured
    several = f" in each of {first.processes} processes" if first.processes > 1 else ""
    table = Table(
        title=f"plan: {steps:,} steps of {first.images} images{several}",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0),
    )
    table.add_column("choice", no_wrap=True)
    for name in ("step", "training", "scoring", "total", "memory", "disk"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in summed(forecasts) if len(forecasts) > 1 else forecasts[0].choices:
        _row(table, choice)
    for name, part in parts if len(parts) > 1 else ():
        _row(table, part.chosen, f"> phase {name}")
    for choice in extra:
        _row(table, choice, f"> {choice.name}")
    table.add_section()
    _row(table, total, "this recipe in all")
    console.print(table, width=WIDTH)
    for line in [*_said(forecasts, total, Path(out)), *_uncertain(forecasts, host)]:
        console.print(line, soft_wrap=False, highlight=False, width=WIDTH)


def _row(table: Table, choice: Choice, name: str | None = None) -> None:
    said = name or f"{'>' if choice.chosen else ' '} {choice.name}"
    times = (choice.step, choice.training, choice.scoring, choice.total)
    table.add_row(said[:24], *map(duration, times), size_text(choice.memory), size_text(choice.disk))


def _said(parts: Sequence[Forecast], total: Choice, out: Path) -> list[str]:
    """What the numbers of the table hold, and what there is too little of."""
    lines = []
    cached = [choice for part in parts for choice in part.choices if choice.stored]
    if cached and len(parts) == 1:
        told = "; ".join(
            f"{choice.name.removeprefix('cached, ')}: {duration(choice.filling)}, {size_text(choice.stored)}"
            for choice in cached
        )
        lines.append(f"Of a cache, filling it (in training and disk above): {told}. A filled one serves other runs.")
    place = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if total.disk > free:
        lines.append(f"Warning: {size_text(free)} are free in {place}, {size_text(total.disk)} are needed.")
    return lines + list(dict.fromkeys(note for part in parts for note in part.notes))


def _uncertain(parts: Sequence[Forecast], host: Host) -> list[str]:
    """How much the numbers can be off."""
    measured = [part.measured for part in parts]
    laps, spread = min(one.laps for one in measured), max(one.spread for one in measured)
    found = f"Measured here: > is the recipe. Medians of {laps} steps after a warm-up"
    found += f", which differ by up to {math.ceil(spread * 100 - 1e-6)}%" if laps > 1 else ""
    if host.others >= 0.1:
        found += f"; other programs used {host.others:.1f} of {host.cores} cores"
    return [f"{found}. {UNKNOWN}"]


@dataclass(frozen=True)
class Fitted:
    """A plan that fills a given time.

    Attributes:
        steps: optimizer steps.
        cached: whether the teacher's answers are stored.
        forecast: what that costs.
    """

    steps: int
    cached: bool
    forecast: Forecast


class Planned:
    """A recipe in one part with its measured step; its data and models are loaded on entering.

    Raises:
        InputError: for data or models that cannot be loaded.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._scratch = tempfile.TemporaryDirectory()

    def __enter__(self) -> "Planned":
        recipe = self.recipe
        task, data = TASKS[recipe.task].from_data(replace(recipe.data, check=16), labelled=recipe.labelled)
        overrides = {**SCORE_ONLY, "disable_tqdm": True}
        self.trainer, self.data = build_trainer(recipe, task, data, Path(self._scratch.name), **overrides), data
        self.measured = measure(self.trainer, *ready(self.trainer))
        return self

    def __exit__(self, *_: Any) -> None:
        self._scratch.cleanup()

    def at(self, steps: int) -> Forecast:
        """The choices at a number of steps."""
        scaled = spanning(self.recipe, steps)
        return forecast(scaled, self.trainer, self.data, self.measured, steps=steps)

    def within(self, seconds: float) -> Fitted:
        """The steps that take so long, with answers for whole images stored where that saves a fifth of the time and
        takes at most a quarter of the free disk."""
        cached, steps = False, self._fitting(seconds, None)
        stored = _of(self.at(steps), WHOLE)
        if stored is not None and stored.stored < 0.25 * shutil.disk_usage(Path.cwd()).free:
            cached = stored.total < 0.8 * self.at(steps).chosen.total
        if cached:
            steps = self._fitting(seconds, WHOLE)
        found = self.at(steps)
        if cached and stored is not None:
            found.choices = [replace(one, chosen=one.name == stored.name) for one in found.choices]
        return Fitted(steps, cached, found)

    def _fitting(self, seconds: float, name: str | None) -> int:
        """Steps, in two digits, of which the choice of this name (None: the recipe's) takes at most so long."""
        steps = 1000
        for _ in range(4):  # a cache is filled once, so that time does not grow evenly with the steps
            one = _of(self.at(steps), name) if name else self.at(steps).chosen
            assert one is not None
            unit = 10 ** max(0, len(str(int(steps * seconds / one.total))) - 2)
            steps = max(20, int(steps * seconds / one.total // unit * unit))
        return steps


def _of(found: Forecast, name: str) -> Choice | None:
    return next((choice for choice in found.choices if choice.name == name), None)
