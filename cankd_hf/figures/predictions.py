"""`predictions.png` while a student trains: what it says of a few images now, beside their labels and the teacher."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.config.data import DataConfig
from cankd_hf.figures.callback import DrawingCallback
from cankd_hf.figures.draw import pca_maps, to_png
from cankd_hf.names import PICTURE_FILE, PICTURES_FOLDER
from cankd_hf.tasks.base import class_labels
from cankd_hf.tasks.panels import Panels, panels
from cankd_hf.tasks.pictures import draw_grid

KEPT = 20  # pictures of earlier evaluations: the first and the newest


class PredictionsCallback(DrawingCallback):
    """Draws the student's answers to a few fixed validation images after each evaluation of a training.

    `predictions.png` in the output folder is that of the last evaluation; `predictions/step_N.png` keeps the first and
    the newest 19. Beside the answers are the images, their labels, and what a teacher of the same task and classes
    says. For a task without answers to draw, such as `features`, it is the principal components of the maps of
    student and teacher as colours. Every tracker of the run (`report_to`) gets the picture as `predictions`.

    Args:
        trainer: a `CanKDTrainer` with a validation set; the caller adds the callback to it.
        images: number of images, spread over the validation set.
    """

    what = "pictures of predictions are drawn"

    def __init__(self, trainer: Trainer, images: int = 4) -> None:
        super().__init__(trainer)
        self.images = images
        self._samples: list[Any] = []
        self._fixed: list[Panels] = []  # of each sample: its label, and the teachers' answers
        self._teachers: list[str] = []
        self._drawn: int | None = None  # the step of the last picture
        self._config = DataConfig()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        nothing = not trainer.task.pictured and trainer.distiller.taps is None
        self._off = not state.is_world_process_zero or sharded or nothing
        self._drawn, self._samples = None, []
        self.guarded(self._begin, state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._samples and self._drawn != state.global_step:  # once for all of several sets
            self._drawn = state.global_step
            score = (metrics or {}).get(f"eval_{self.trainer.task.metric}")
            self._heading = f"step {state.global_step} of {state.max_steps}"
            if score is not None:
                self._heading += f", {self.trainer.task.metrics[self.trainer.task.metric].title} {score:.3f}"
            self.guarded(self._draw, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._samples, self._fixed = [], []  # what is evaluated from now on is no part of the training

    def _begin(self, state: TrainerState) -> None:
        trainer = self.trainer
        self._samples = self.samples(self.images if trainer.task.pictured else min(self.images, 2))
        if not trainer.task.pictured:
            return
        stats = trainer.processing_class
        self._config = DataConfig(image_mean=list(stats.image_mean), image_std=list(stats.image_std))
        models = {
            name: teacher
            for name, teacher in trainer.teachers.items()
            if trainer.task.accepts(teacher.model) and class_labels(teacher.model) == trainer.task.id2label
        }
        self._teachers = list(models)
        means = {name: (teacher.stats.mean, teacher.stats.std) for name, teacher in models.items()}
        plain = {name: teacher.model for name, teacher in models.items()}
        self._fixed = [panels(trainer.task, sample, plain, self._config, means) for sample in self._samples]

    def _draw(self, state: TrainerState) -> None:
        folder = Path(self.trainer.args.output_dir)
        file, kept = folder / PICTURE_FILE, folder / PICTURES_FOLDER
        kept.mkdir(parents=True, exist_ok=True)
        made = self._answers(file) if self.trainer.task.pictured else self._components(file)
        shutil.copyfile(file, kept / f"step_{state.global_step}.png")
        for _, old in _by_step(kept)[1 : 1 - KEPT]:
            old.unlink(missing_ok=True)
        self.send({"predictions": made}, state.global_step)

    def _answers(self, file: Path) -> Image.Image:
        task = self.trainer.task
        pictures: list[list[np.ndarray]] = []
        captions: list[list[str]] = []
        for sample, fixed in zip(self._samples, self._fixed, strict=True):
            own = panels(task, sample, {"": self.trainer.student}, self._config)
            pictures.append([*fixed.pictures[:2], own.pictures[2], *fixed.pictures[2:]])
            captions.append([*fixed.captions[:2], own.captions[2], *fixed.captions[2:]])
        heading = "; ".join(text for text in (self._heading, task.picture_note) if text)
        titles = ["image", "ground truth", "prediction", *self._teachers]
        return draw_grid(file, titles, pictures, task.legend(), heading, captions)

    def _components(self, file: Path) -> Image.Image:
        seen = self.seen("student", [sample["pixel_values"] for sample in self._samples])
        found = [np.asarray(Image.open(io.BytesIO(to_png(pca_maps(one)))).convert("RGB")) for one in seen]
        return draw_grid(file, [""], [[one] for one in found], heading=self._heading, width=found[0].shape[1])


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """The pictures that are kept, by their step."""
    found = ((re.fullmatch(r"step_(\d+)\.png", file.name), file) for file in folder.iterdir())
    return sorted((int(match[1]), file) for match, file in found if match is not None)
