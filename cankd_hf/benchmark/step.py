"""`python -m cankd_hf.benchmark step RECIPE`: where the time of a distillation step goes.

`python -m cankd_hf.benchmark teacher RECIPE`: what early stop, dtype and compiling do for the teacher's forward.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import set_seed

from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.batch import Batch
from cankd_hf.errors import InputError
from cankd_hf.features.taps import Taps
from cankd_hf.runs.build import SCORE_ONLY, build_trainer
from cankd_hf.tasks import TASKS
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.trainer import CanKDTrainer


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_parts(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each part; the parts take turns, so that a machine that slows down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            start = _clock()
            part()
            # The first turn warms up.
            if turn:
                seconds[name].append(_clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory() -> int:
    """Bytes at the highest point so far: on the GPU where there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


SIMILARITY = "raw similarity (log steps only)"


class _Step:
    """One distillation step of a recipe, whole and in parts."""

    def __init__(self, recipe: Recipe) -> None:
        task, data = TASKS[recipe.task].from_data(
            replace(recipe.data, check="none"), labelled=recipe.distill.task_weight > 0, splits=("train",)
        )
        set_seed(recipe.seed)
        with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its output folder at once
            self.trainer: CanKDTrainer = build_trainer(recipe, task, data, Path(scratch), **SCORE_ONLY)
        if self.trainer.teacher is None:
            raise InputError("teacher: expected a recipe with a teacher, got none; nothing is distilled")
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        # In the middle of the run, where a warm-up of the weight is over.
        self.trainer.state.max_steps, self.trainer.state.global_step, self.trainer.state.logging_steps = (
            1000,
            500,
            1000,
        )
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.model.train()
        self.batches = iter(self._forever())
        self.inputs = self.trainer._prepare_inputs(next(self.batches))
        self.outputs = self.trainer.source(Batch(self.inputs))
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            self.model(**self.inputs)
            distiller = self.trainer.distiller
            distiller.student(pixel_values=self.inputs["pixel_values"])
            maps = distiller.taps.collect(tuple(self.inputs["pixel_values"].shape[-2:]))  # type: ignore[union-attr]
        self.student_maps = [feature_map.detach().requires_grad_() for feature_map in maps]

    def _forever(self) -> Any:
        loader = self.trainer.get_train_dataloader()
        while True:
            yield from loader

    def parts(self) -> dict[str, Callable[[], Any]]:
        return {
            "data": lambda: next(self.batches),
            "teacher forward": lambda: self.trainer.source(Batch(self.inputs)),
            "student forward + backward": self.student,
            "connectors + loss": self.distillation,
            "optimizer": self.optimizer,
            "whole step": self.whole,
            SIMILARITY: self.similarity,
        }

    def student(self) -> None:
        with self.trainer.compute_loss_context_manager():
            outputs = self.model(**self.inputs)
        loss = outputs["loss"]
        if loss is None:  # label-free: a gradient has to come from somewhere
            with self.trainer.compute_loss_context_manager():
                self.trainer.distiller.student(pixel_values=self.inputs["pixel_values"])
            size = tuple(self.inputs["pixel_values"].shape[-2:])
            maps = self.trainer.distiller.taps.collect(size)  # type: ignore[union-attr]
            loss = torch.stack([feature_map.float().mean() for feature_map in maps]).sum()
        loss.backward()

    def distillation(self) -> None:
        distiller = self.trainer.distiller
        total: Tensor | float = 0.0
        with self.trainer.compute_loss_context_manager():
            connected = distiller.connect(self.student_maps, self.outputs)
            for item in distiller.placed:
                if item.pair is not None:
                    total = total + item.loss(*connected[item.pair.name])
        assert isinstance(total, Tensor)
        total.backward()

    def similarity(self) -> None:
        distiller = self.trainer.distiller
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            connected = distiller.connect(self.student_maps, self.outputs)
            distiller.measure(self.student_maps, self.outputs, connected)

    def optimizer(self) -> None:
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def whole(self) -> None:
        inputs = self.trainer._prepare_inputs(next(self.batches))
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, inputs)
        loss.backward()
        self.optimizer()


def run_step(recipe: Recipe, repeats: int, console: Console) -> dict[str, float]:
    """Prints and returns the seconds of each part of a step."""
    step = _Step(recipe)
    seconds = time_parts(step.parts(), repeats)
    whole = seconds["whole step"]
    shape = " x ".join(str(size) for size in step.inputs["pixel_values"].shape)
    table = Table(title=f"one step, batch {shape}, median of {repeats}", title_justify="left")
    for name in ("part", "seconds", "of the step"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.4f}", f"{value / whole:.1%}")
    console.print(table)
    base = seconds["student forward + backward"] + seconds["teacher forward"] + seconds["optimizer"] + seconds["data"]
    every = max(1, int(step.trainer.args.logging_steps))
    share = seconds[SIMILARITY] / every / whole
    console.print(f"Raw similarity, measured once in {every} steps (training.logging_steps): {share:.2%} of the time")
    console.print(f"Overhead of distillation over student step + teacher forward: {whole / base - 1:+.1%}")
    console.print(f"Peak memory: {peak_memory() / 2**30:.2f} GiB")
    return seconds


def run_teacher(recipe: Recipe, repeats: int, console: Console, compile: bool = True) -> dict[str, float]:
    """Prints and returns the seconds of the teacher's forward, plain and with each saving added."""
    if recipe.teacher is None:
        raise InputError("teacher: expected a recipe with a teacher, got one without")
    config = replace(recipe.teacher, fit=None, dtype="float32", compile=False)
    height, width = recipe.data.crop_size or recipe.data.image_size or [224, 224]
    batch = recipe.training.get("per_device_train_batch_size", 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(batch, 3, height, width, device=device)

    teachers = {"early stop": load_teacher(config), "+ bfloat16": load_teacher(config, dtype="bfloat16")}
    if compile:
        teachers["+ compile"] = load_teacher(config, dtype="bfloat16", compile=True)
    whole = load_teacher(config).to(device)
    whole.taps = Taps(whole.model, whole.config.taps, stop_early=False)
    parts: dict[str, Callable[[], Any]] = {"whole model, float32": partial(whole, images)}
    for name, teacher in teachers.items():
        parts[name] = partial(teacher.to(device), images)
    seconds = time_parts(parts, repeats)
    base = seconds["whole model, float32"]
    table = Table(title=f"teacher forward, batch {batch} x 3 x {height} x {width}", title_justify="left")
    for name in ("form", "seconds", "gain"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.4f}", f"{base / value:.2f}x")
    console.print(table)
    return seconds
