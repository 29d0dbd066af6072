"""`python -m cankd_hf.benchmark step RECIPE`: where the time of a distillation step goes.

`python -m cankd_hf.benchmark teacher RECIPE`: what early stop, dtype and compiling do for a teacher's forward.
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import set_seed

from cankd_hf.benchmark.measure import Clock, interleaved, table
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.batch import Batch
from cankd_hf.errors import InputError
from cankd_hf.features.dense import dense_of
from cankd_hf.features.grids import logits_of
from cankd_hf.features.taps import Taps
from cankd_hf.runs.build import SCORE_ONLY, build_trainer
from cankd_hf.tasks import TASKS
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.mixing import mix_outputs
from cankd_hf.training.placing import asked_of_student
from cankd_hf.training.trainer import CanKDTrainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_DEVICE = "whole step, data on the device"
SIMILARITY = "raw similarity (log steps only)"


def _medians(
    parts: Mapping[str, Callable[[], object]], repeats: int, clock: Clock = time.perf_counter
) -> dict[str, float]:
    times = interleaved(list(parts.values()), repeats, DEVICE, clock)
    return {name: statistics.median(values) for name, values in zip(parts, times, strict=True)}


def _detached(outputs: Any) -> dict[str, Any]:
    """The dense predictions of an output, if there are any, as the start of a graph."""
    dense = dense_of(outputs)
    return {} if dense is None else {"dense": {key: x.detach().requires_grad_() for key, x in dense.items()}}


class _Step:
    """One distillation step of a recipe, whole and in parts."""

    def __init__(self, recipe: Recipe) -> None:
        task, data = TASKS[recipe.task].from_data(
            replace(recipe.data, check="none"), labelled=recipe.distill.task_weight > 0, splits=("train",)
        )
        set_seed(recipe.seed)
        with tempfile.TemporaryDirectory() as scratch:  # the Trainer creates its output folder at once
            self.trainer: CanKDTrainer = build_trainer(recipe, task, data, Path(scratch), **SCORE_ONLY)
        if not self.trainer.teachers:
            raise InputError("teacher: expected a recipe with a teacher, got none; nothing is distilled")
        self.trainer.args.conditioning_batches = 1
        self.trainer.measure_conditioning()
        self.trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        state = self.trainer.state
        state.max_steps, state.global_step, state.logging_steps = 1000, 500, 1000  # after any warm-up of a weight
        self.model = self.trainer.accelerator.prepare_model(self.trainer.model)
        self.model.train()
        self.distiller = self.trainer.distiller
        self.batches = self._forever()
        self.inputs = self.trainer._prepare_inputs(next(self.batches))
        batch = Batch(self.inputs)
        self.outputs = mix_outputs(self.trainer.source(batch), batch.meta.get("mix"), batch["pixel_values"].shape[-2:])
        self.asked = asked_of_student(self.outputs)
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            self.labelled = self.model(**self.asked_inputs()).loss is not None
            maps, outputs = self._student_forward()
        self.read, logits = _detached(outputs), logits_of(outputs)
        self.student_maps = [feature_map.detach().requires_grad_() for feature_map in maps]
        self.logits = None if logits is None else logits.detach().requires_grad_()

    def _forever(self) -> Iterator[dict[str, Any]]:
        loader = self.trainer.get_train_dataloader()
        while True:
            yield from loader

    def asked_inputs(self) -> dict[str, Any]:
        """Arguments of the `Distiller` for the student alone."""
        batch = Batch(self.inputs)
        return {**batch.inputs, "meta": batch.meta}

    def _student_forward(self) -> tuple[list[Tensor], Any]:
        """The student's maps and output."""
        taps, pixels = self.distiller.taps, self.inputs["pixel_values"]
        assert taps is not None
        outputs = self.distiller.student(pixel_values=pixels, **self.asked)
        return taps.collect((pixels.shape[-2], pixels.shape[-1])), outputs

    def parts(self) -> dict[str, Callable[[], object]]:
        return {
            "data": lambda: next(self.batches),
            "teacher forward": lambda: self.trainer.source(Batch(self.inputs)),
            "student forward + backward": self.student,
            "connectors + loss + clip": self.distillation,
            "optimizer": self.optimizer,
            "whole step": self.whole,
            ON_DEVICE: lambda: self.live(self.inputs),
            SIMILARITY: self.similarity,
        }

    def student(self) -> None:
        with self.trainer.compute_loss_context_manager():
            if self.labelled:
                loss = self.model(**self.asked_inputs()).loss
            else:  # any loss that gives a gradient
                maps, _ = self._student_forward()
                loss = torch.stack([feature_map.float().mean() for feature_map in maps]).sum()
        loss.backward()

    def distillation(self) -> None:
        with self.trainer.compute_loss_context_manager():
            connected = self.distiller.connect(self.student_maps, self.outputs, Batch(self.inputs).meta.get("seen"))
            read = self.logits, self.outputs, self.inputs.get("labels"), self.read
            values = [value for _, value in self.distiller.values(connected, *read)]
        torch.stack(values).sum().backward()
        self.clip()

    def clip(self) -> None:
        """Limits the gradients of all that is trained, as the Trainer does before each optimizer step."""
        limit = self.trainer.args.max_grad_norm
        if limit:
            self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    def similarity(self) -> None:
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            connected = self.distiller.connect(self.student_maps, self.outputs, Batch(self.inputs).meta.get("seen"))
            self.distiller.measure(self.student_maps, self.outputs, connected)

    def optimizer(self) -> None:
        optimizer = self.trainer.optimizer
        assert optimizer is not None
        optimizer.step()
        optimizer.zero_grad()

    def whole(self) -> None:
        self.live(self.trainer._prepare_inputs(next(self.batches)))

    def live(self, inputs: dict[str, Any]) -> None:
        """One step of training on a batch that is on the device."""
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, inputs)
        loss.backward()
        self.clip()
        self.optimizer()


def run_step(recipe: Recipe, repeats: int, console: Console, clock: Clock = time.perf_counter) -> None:
    """Prints the seconds of each part of a step, the overhead of distillation and the peak memory."""
    step = _Step(recipe)
    seconds = _medians(step.parts(), repeats, clock)
    step.trainer.close_loaders()
    whole = seconds["whole step"]
    shape = " x ".join(str(size) for size in step.inputs["pixel_values"].shape)
    rows = [(name, f"{value:.4f}", f"{value / whole:.1%}") for name, value in seconds.items()]
    title = f"one step, batch {shape}, median of {repeats}"
    console.print(table(title, ("part", "seconds", "of the step"), rows))
    images = step.inputs["pixel_values"].shape[0]
    console.print(
        f"Images a second: {images / whole:.0f} with the loader, {images / seconds[ON_DEVICE]:.0f} without "
        f"(batch {images})"
    )
    base = seconds["student forward + backward"] + seconds["teacher forward"] + seconds["optimizer"] + seconds["data"]
    every = max(1, int(step.trainer.args.logging_steps))
    share = seconds[SIMILARITY] / every / whole
    console.print(f"Raw similarity, measured once in {every} steps (training.logging_steps): {share:.2%} of the time")
    console.print(f"Overhead of distillation over student step + teacher forward: {whole / base - 1:+.1%}")
    # On the GPU where there is one, else resident in this process.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident
    console.print(f"Peak memory: {peak / 2**30:.2f} GiB")


def run_teacher(recipe: Recipe, repeats: int, console: Console, compile: bool = True) -> None:
    """Prints the seconds of each teacher's forward, plain and with each saving added."""
    teachers = recipe.named_teachers()
    if not teachers:
        raise InputError("teacher: expected a recipe with a teacher, got one without")
    height, width = recipe.data.crop_size or recipe.data.image_size or [224, 224]
    batch = recipe.training.get("per_device_train_batch_size", 8)
    images = torch.randn(batch, 3, height, width, device=DEVICE)
    for name, given in teachers.items():
        config = replace(given, fit=None, dtype="float32", compile=False)
        forms = {"whole model, float32": load_teacher(config, seed=0), "early stop": load_teacher(config, seed=0)}
        forms["+ bfloat16"] = load_teacher(config, seed=0, dtype="bfloat16")
        if compile:
            forms["+ compile"] = load_teacher(config, seed=0, dtype="bfloat16", compile=True)
        whole = forms["whole model, float32"]
        whole.taps = Taps(whole.model, whole.config.taps, stop_early=False)
        seconds = _medians({form: partial(teacher.to(DEVICE), images) for form, teacher in forms.items()}, repeats)
        base = seconds["whole model, float32"]
        rows = [(form, f"{value:.4f}", f"{base / value:.2f}x") for form, value in seconds.items()]
        which = f"teacher {name}" if len(teachers) > 1 else "teacher"
        title = f"{which} forward, batch {batch} x 3 x {height} x {width}"
        console.print(table(title, ("form", "seconds", "gain"), rows))
