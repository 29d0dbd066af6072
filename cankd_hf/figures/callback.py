"""Logs figures during training to TensorBoard, Trackio and W&B."""

import io
import logging
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

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


class FeatureFiguresCallback(TrainerCallback):
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

    def __init__(self, trainer: Trainer, steps: int = 0, images: int = 2) -> None:
        self.trainer = trainer
        self.steps = steps
        self.images = images
        self._pixels: list[Tensor] = []
        self._start: list[Seen] = []
        self._off = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.is_fsdp_enabled:
            raise InputError("log_figures_steps: needs whole weights in one process, FSDP shards them; set it to 0")
        self._off = not state.is_world_process_zero
        self._guarded(self._begin, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps > 0 and state.global_step % self.steps == 0:
            self._guarded(self._log, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps == 0 and self._start:
            self._guarded(self._log, state)

    def _guarded(self, work: Callable[[TrainerState], None], state: TrainerState) -> None:
        """A failure is a warning and never stops the run; the run's random state is restored."""
        if self._off:
            return
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        try:
            with torch.random.fork_rng(devices=devices):
                work(state)
        except Exception as error:  # whatever goes wrong in drawing or in a tracker's client
            self._off = True
            logger.warning("no figures are logged from here on: %s: %s", type(error).__name__, error)

    def _begin(self, state: TrainerState) -> None:
        trainer: Any = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise RuntimeError("the student's weights are sharded over processes, so no process can run it alone")
        dataset = trainer.eval_dataset
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()), None)
        if dataset is None:
            raise RuntimeError("there is no validation set to take images from")
        self._pixels = [sample["pixel_values"] for sample in sample_evenly(dataset, self.images)]
        self._start = self._look(f"student at step {state.global_step}")

    def _look(self, name: str) -> list[Seen]:
        trainer: Any = self.trainer
        if trainer.distiller.taps is None:
            raise RuntimeError("there is no distillation loss, so no maps are read")
        stats = trainer.processing_class.image_mean, trainer.processing_class.image_std
        subject = Subject(name, trainer.distiller.taps, trainer.distiller)
        return [
            look(str(number), pixels, denormalize(pixels.float().cpu(), *stats), [subject], trainer.teachers)
            for number, pixels in enumerate(self._pixels)
        ]

    def _log(self, state: TrainerState) -> None:
        callbacks = self.trainer.callback_handler.callbacks
        senders = [(callback, send) for callback in callbacks for kind, send in SENDERS if isinstance(callback, kind)]
        if not senders:
            raise RuntimeError("report_to names neither tensorboard, trackio nor wandb")
        pictures: dict[str, Image.Image] = {}
        for number, (before, now) in enumerate(zip(self._start, self._look("student now"), strict=True)):
            now.students = {**before.students, **now.students}
            now.connected = {**before.connected, **now.connected}
            for name, draw in FIGURES.items():
                figure = draw(now)
                if figure is not None:
                    pictures[f"features/{name}/{number}"] = Image.open(io.BytesIO(to_png(figure))).convert("RGB")
        for callback, send in senders:
            send(callback, pictures, state.global_step)


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
