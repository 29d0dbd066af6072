"""The images that forms are scored on and int8 is calibrated on, read as evaluation reads them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import cached_file

from cankd_hf.config.data import DataConfig
from cankd_hf.config.reading import load_data_config
from cankd_hf.data.features.load import load_images
from cankd_hf.errors import InputError
from cankd_hf.export.checks import LEAST_IMAGES
from cankd_hf.export.source import Source
from cankd_hf.names import RECIPE_FILE
from cankd_hf.tasks import TASKS, Task

ROLES = {"test": ("test",), "validation": ("eval",), None: ("eval", "test")}


@dataclass
class Images:
    """A data set without augmentation.

    Attributes:
        task: its task, adapted to the student.
        dataset: items with `pixel_values` [3, h, w] and, for scores, `labels`.
        name: of its split, or its folder.
        config: how its images are read.
    """

    task: Task
    dataset: Any
    name: str
    config: DataConfig

    def resize(self, size: tuple[int, int]) -> bool:
        """Makes all images of one size, for a file that takes no other. Returns whether that changed anything."""
        if self.config.image_size == list(size) and not self.config.keep_aspect:
            return False
        self.config = replace(self.config, image_size=list(size), keep_aspect=False)
        self.dataset.transform = self.task.eval_transform(self.config)
        return True

    def batches(self, count: int | None = None) -> Iterator[dict[str, Any]]:
        """Batches of one image, without padding for its neighbours; `count` of them spread over the set, or all."""
        samples = self._samples(count)
        while True:
            try:
                sample = next(samples, None)
            except InputError as error:
                raise InputError([f"images of {self.name}: {problem}" for problem in error.problems]) from error
            if sample is None:
                return
            yield self.task.collate([sample])

    def _samples(self, count: int | None) -> Iterator[dict[str, Any]]:
        if not hasattr(self.dataset, "__len__"):  # a stream
            for index, sample in enumerate(self.dataset):
                if index == count:
                    return
                yield sample
            return
        total = len(self.dataset)
        for place in np.linspace(0, total - 1, total if count is None else min(count, total)).round().astype(int):
            yield self.dataset[int(place)]


def data_config(source: Source, overrides: list[str]) -> DataConfig:
    """How the data are read: as the recipe beside the student says, else as its preprocessor does, with overrides."""
    saved = cached_file(source.name, RECIPE_FILE, _raise_exceptions_for_missing_entries=False)
    if saved is not None:
        return load_data_config(saved, overrides)
    size = source.preprocessor.get("size") or {}
    known = {"image_size": [size["height"], size["width"]]} if {"height", "width"} <= size.keys() else {}
    known |= {name: source.preprocessor[name] for name in ("image_mean", "image_std") if name in source.preprocessor}
    return load_data_config(None, [*(f"data.{name}={value}" for name, value in known.items()), *overrides])


def scored_images(source: Source, config: DataConfig, split: str | None) -> Images:
    """The split to score on: `split`, else test where there is one.

    Raises:
        InputError: if it cannot be read, or was made for other classes than the student.
    """
    kind = TASKS[source.task]
    task, data = kind.from_data(config, labelled=kind.takes_labels, splits=ROLES[split])
    name, dataset = ("test", data.test) if data.test is not None else ("validation", data.eval)
    if dataset is None:
        raise InputError("data: expected a split to score on, found none; name it with data.test_split")
    classes = len(task.id2label)
    if classes and source.model.config.num_labels != classes:
        raise InputError(
            f"{source.name}: the student knows {source.model.config.num_labels} classes, the data have {classes}; "
            "name the data set it was trained for"
        )
    return Images(task.for_model(source.model), dataset, name, config)


def calibration_images(source: Source, config: DataConfig, folder: str | None) -> Images:
    """The images to calibrate on: those of `folder`, else the training split of the data.

    Raises:
        InputError: if they cannot be read, or are fewer than `LEAST_IMAGES`.
    """
    kind = TASKS[source.task]
    if folder is None:
        task, data = kind.from_data(replace(config, check="none"), labelled=kind.takes_labels, splits=("train",))
        name, place = config.train_split, f"data.train_split: {config.train_split} of {config.path}"
    else:
        kept = {
            key: getattr(config, key) for key in ("image_size", "image_mean", "image_std", "max_pixels", "on_error")
        }
        try:
            data = load_images(DataConfig(path=folder, check="none", **kept), ("train",))
        except InputError as error:
            told = [problem.removeprefix("data.train_split: ") for problem in error.problems]
            raise InputError([f"--calibrate {folder}: {problem}" for problem in told]) from error
        task, name, place = kind.from_model(source.model), Path(folder).name, f"--calibrate {folder}"
    made = Images(task.for_model(source.model), data.train, name, config)
    made.dataset.transform = task.eval_transform(config)
    if hasattr(made.dataset, "__len__") and len(made.dataset) < LEAST_IMAGES:
        raise InputError(
            f"{place}: expected at least {LEAST_IMAGES} images to calibrate int8 on, got {len(made.dataset)}; name a "
            "folder with more as --calibrate"
        )
    return made


def digests(images: Images) -> set[bytes]:
    """Digests of all images of a set, as the student sees them."""
    return {_digest(batch["pixel_values"]) for batch in images.batches()}


def calibrating(images: Images, count: int, apart: set[bytes]) -> Iterator[Tensor]:
    """`pixel_values` [1, 3, H, W] of up to `count` images, one at a time, without those whose digests are in `apart`.

    Raises:
        InputError: at the end, if there were fewer than `LEAST_IMAGES`; or for an image that cannot be used.
    """
    used = scored = 0
    for batch in images.batches(count):
        pixels = batch["pixel_values"]
        if _digest(pixels) in apart:
            scored += 1
            continue
        if not torch.isfinite(pixels).all():
            raise InputError(f"calibration: an image of {images.name} holds values that are not finite; remove it")
        used += 1
        yield pixels
    if used < LEAST_IMAGES:
        also = f", and {scored} that are scored too, which may not be used" if scored else ""
        raise InputError(
            f"calibration: expected at least {LEAST_IMAGES} images, got {used} of {images.name}{also}; name other "
            "images with --calibrate FOLDER"
        )


def _digest(pixels: Tensor) -> bytes:
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).digest()
