"""`python -m cankd_hf.benchmark trainer [RECIPE]`: whole trainers side by side.

The stock Trainer, and ours without a teacher and with the recipe's teachers (live and stored), with the same student,
data and arguments: short runs in turn, so that other load affects all of them alike.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cankd_hf.benchmark.measure import synchronise, table
from cankd_hf.benchmark.storing import with_caches
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.batch import BatchCollator
from cankd_hf.errors import InputError
from cankd_hf.host import family_seconds
from cankd_hf.runs.build import SCORE_ONLY, build_student, build_teacher, make_trainer, training_args
from cankd_hf.tasks import TASKS

STOCK, ALONE = "stock Trainer", "ours, no teacher"
STORED = ", stored teacher"
SKIPPED = 2  # steps at the beginning of each run that are not counted


class _Steps(TrainerCallback):
    """Wall-clock and CPU seconds of a step, over all steps of a run but the first ones."""

    def __init__(self) -> None:
        self.start = self.end = (0.0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (SKIPPED, state.max_steps):
            synchronise(args.device)
            now = time.perf_counter(), family_seconds()
            self.start, self.end = (now, now) if state.global_step == SKIPPED else (self.start, now)

    def seconds(self, steps: int) -> tuple[float, ...]:
        return tuple((end - start) / (steps - SKIPPED) for start, end in zip(self.start, self.end, strict=True))


def run_trainer(recipe: Recipe, steps: int, repeats: int, console: Console) -> dict[str, float]:
    """Prints seconds a step; returns CPU seconds of each form as a multiple of the stock Trainer's.

    Raises:
        InputError: for a recipe without the student's own loss, which the stock Trainer needs.
    """
    if recipe.distill.task_weight == 0:
        raise InputError("distill.task_weight: expected more than 0: the stock Trainer needs the student's own loss")
    if steps <= SKIPPED:
        raise InputError(f"--steps: expected at least {SKIPPED + 1}, got {steps}")
    with tempfile.TemporaryDirectory() as scratch:
        runs = _forms(recipe, steps, Path(scratch))
        times: dict[str, list[tuple[float, ...]]] = {name: [] for name in runs}
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                seconds = run()
                if repeat:  # the first turn warms up
                    times[name].append(seconds)
    ratios, rows = {}, []
    for name, measured in times.items():
        wall, cpu = (median(seconds) for seconds in zip(*measured, strict=True))
        relative = [
            tuple(own / stock for own, stock in zip(one, other, strict=True))
            for one, other in zip(measured, times[STOCK], strict=True)
        ]
        wall_ratio, ratios[name] = (median(values) for values in zip(*relative, strict=True))
        shown = (f"{1000 * wall:.2f} ms", f"{wall_ratio:.3f}x", f"{1000 * cpu:.2f} ms", f"{ratios[name]:.3f}x")
        rows.append((name, *shown))
    title = (
        f"one step of a whole trainer, median of {repeats} turns of {steps} steps, {torch.get_num_threads()} threads"
    )
    columns = ("trainer", "wall-clock", "of stock", "CPU (user + system)", "of stock")
    console.print(table(title, columns, rows))
    for name in [name for name in times if name not in (STOCK, ALONE)]:
        wall, cpu = (
            median(one[clock] / other[clock] for one, other in zip(times[name], times[ALONE], strict=True))
            for clock in (0, 1)
        )
        console.print(f"{name}: {wall:.3f}x of ours without a teacher by the clock, {cpu:.3f}x of its CPU time")
    return ratios


def _forms(recipe: Recipe, steps: int, folder: Path) -> dict[str, Callable[[], tuple[float, ...]]]:
    """For each trainer a run of some steps that returns the seconds of one."""
    task, data = TASKS[recipe.task].from_data(replace(recipe.data, check="none"), splits=("train",))
    quiet = {**SCORE_ONLY, "max_steps": steps, "logging_steps": steps, "disable_tqdm": True, "channels_last": False}
    args = training_args(recipe, folder, **quiet)
    shared = {field.name: getattr(args, field.name) for field in fields(TrainingArguments) if field.init}
    teachers = {name: build_teacher(recipe, name, config) for name, config in recipe.named_teachers().items()}
    student = build_student(recipe, task)
    made: dict[str, Trainer] = {
        STOCK: Trainer(
            student,
            TrainingArguments(**shared),
            data_collator=BatchCollator(task.for_model(student).collate, student.dtype),
            train_dataset=data.train,
        ),
        ALONE: make_trainer(recipe, task, data, build_student(recipe, task), {}, args),
    }
    if teachers:
        stored = with_caches(recipe, folder / "answers")
        again = {name: build_teacher(recipe, name, config) for name, config in stored.named_teachers().items()}
        losses = " + ".join(dict.fromkeys(term.label for term in recipe.distill.terms))
        made[f"ours, {losses}"] = make_trainer(recipe, task, data, build_student(recipe, task), teachers, args)
        made[f"ours, {losses}{STORED}"] = make_trainer(recipe, task, data, build_student(recipe, task), again, args)
    return {name: _run_of(trainer, steps) for name, trainer in made.items()}


def _run_of(trainer: Trainer, steps: int) -> Callable[[], tuple[float, ...]]:
    watch = _Steps()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)

    def run() -> tuple[float, ...]:
        trainer.train()
        return watch.seconds(steps)

    return run
