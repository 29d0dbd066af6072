"""Logs figures during training to TensorBoard, Trackio and W&B."""

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from cankd_hf.errors import InputError
from cankd_hf.figures.draw import attention_maps, difference_maps, heat_maps, pca_maps, to_png
from cankd_hf.figures.look import Seen, Subject, look
from cankd_hf.tasks.pictures import denormalize, sample_evenly

logger = logging.getLogger(__name__)

FIGURES: dict[str, Callable[[Seen], Figure | None]] = {
    "activation": heat_maps,
    "difference": difference_maps,
    "principal_components": pca_maps,
    "attention": attention_maps,
}


class DrawingCallback(TrainerCallback):
    """Base of callbacks that draw while a student trains, in the first process alone.

    Training is not affected: modes, gradients and random state stay as they were. If drawing fails, one warning says
    why and training goes on without.

    Args:
        trainer: a `CanKDTrainer` with a validation set; the caller adds the callback to it.
    """

    what: ClassVar[str]  # that is drawn, in the warning

    def __init__(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer
        self._off = False

    def guarded(self, work: Callable[[TrainerState], None], state: TrainerState) -> None:
        """A failure is a warning and never stops the run; the run's random state is restored."""
        if self._off:
            return
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        try:
            with torch.random.fork_rng(devices=devices):
                work(state)
        except Exception as error:  # whatever goes wrong in drawing or in a tracker's client
            self._off = True
            logger.warning("no %s from here on: %s: %s", self.what, type(error).__name__, error)

    def samples(self, count: int) -> list[Any]:
        """Samples spread over the (first) validation set; the first ones of a stream."""
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise RuntimeError("the student's weights are sharded over processes, so no process can run it alone")
        dataset = self.trainer.eval_dataset
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()), None)
        if dataset is None:
            raise RuntimeError("there is no validation set to take images from")
        return sample_evenly(dataset, count)

    def seen(self, name: str, pixels: Sequence[Tensor]) -> list[Seen]:
        """The maps of the student, under this name, and of its teachers for images [3, H, W]."""
        trainer = self.trainer
        if trainer.distiller.taps is None:
            raise RuntimeError("there is no distillation loss, so no maps are read")
        stats = trainer.processing_class.image_mean, trainer.processing_class.image_std
        subject = Subject(name, trainer.distiller.taps, trainer.distiller)
        return [
            look(str(number), one, denormalize(one.float().cpu(), *stats), [subject], trainer.teachers)
            for number, one in enumerate(pixels)
        ]

    def send(self, pictures: Mapping[str, Image.Image], step: int) -> bool:
        """Logs pictures by name to every tracker of the run; returns whether there is any."""
        callbacks = self.trainer.callback_handler.callbacks
        senders = [(callback, send) for callback in callbacks for kind, send in SENDERS if isinstance(callback, kind)]
        for callback, send in senders:
            send(callback, pictures, step)
        return bool(senders)


class FeatureFiguresCallback(DrawingCallback):
    """Logs figures of a few fixed validation images: the student now, the student at the start and the teachers.

    They go to every tracker among the trainer's callbacks (`report_to`), as images `features/FIGURE/NUMBER`. Training
    is not affected: modes, gradients and random state stay as they were. If drawing fails, one warning says why and
    training goes on without figures.

    Args:
        trainer: a `CanKDTrainer` with a validation set; the caller adds the callback to it.
        steps: log every so many steps; 0: at each evaluation.
        images: number of images, spread over the validation set.

    Example:
        trainer.add_callback(FeatureFiguresCallback(trainer, steps=500))
    """

    what = "figures are logged"

    def __init__(self, trainer: Trainer, steps: int = 0, images: int = 2) -> None:
        super().__init__(trainer)
        self.steps = steps
        self.images = images
        self._pixels: list[Tensor] = []
        self._start: list[Seen] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.is_fsdp_enabled:
            raise InputError("log_figures_steps: needs whole weights in one process, FSDP shards them; set it to 0")
        self._off = not state.is_world_process_zero
        self.guarded(self._begin, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps > 0 and state.global_step % self.steps == 0:
            self.guarded(self._log, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps == 0 and self._start:
            self.guarded(self._log, state)

    def _begin(self, state: TrainerState) -> None:
        self._pixels = [sample["pixel_values"] for sample in self.samples(self.images)]
        self._start = self.seen(f"student at step {state.global_step}", self._pixels)

    def _log(self, state: TrainerState) -> None:
        pictures: dict[str, Image.Image] = {}
        for number, (before, now) in enumerate(zip(self._start, self.seen("student now", self._pixels), strict=True)):
            now.students = {**before.students, **now.students}
            now.connected = {**before.connected, **now.connected}
            for name, draw in FIGURES.items():
                figure = draw(now)
                if figure is not None:
                    pictures[f"features/{name}/{number}"] = Image.open(io.BytesIO(to_png(figure))).convert("RGB")
        if not self.send(pictures, state.global_step):
            raise RuntimeError("report_to names neither tensorboard, trackio nor wandb")


def _to_tensorboard(callback: Any, pictures: Mapping[str, Image.Image], step: int) -> None:
    if callback.tb_writer is None:
        raise RuntimeError("TensorBoard has no writer open")
    for tag, picture in pictures.items():
        callback.tb_writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")


def _to_package(name: str, callback: Any, pictures: Mapping[str, Image.Image], step: int) -> None:
    """Logs to wandb or trackio, which have the same interface."""
    package = import_module(name)
    package.log({**{tag: package.Image(picture) for tag, picture in pictures.items()}, "train/global_step": step})


# A tracker's callback exists only where its package is installed.
SENDERS: tuple[tuple[type, Callable[[Any, Mapping[str, Image.Image], int], None]], ...] = (
    (TensorBoardCallback, _to_tensorboard),
    (WandbCallback, partial(_to_package, "wandb")),
    (TrackioCallback, partial(_to_package, "trackio")),
)
