"""The images to show: files, or some of the recipe's own data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from cankd_hf.config.data import DataConfig
from cankd_hf.config.recipe import Recipe
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.decode import Decoder, Unusable
from cankd_hf.errors import InputError
from cankd_hf.tasks import TASKS, Task
from cankd_hf.tasks.pictures import denormalize, sample_evenly


@dataclass
class Picture:
    """One image, resized and normalised as in evaluation."""

    name: str
    pixel_values: Tensor  # [3, H, W]
    size: tuple[int, int]  # height and width before it was resized
    image: np.ndarray  # the same without normalisation, [H, W, 3] in 0..1


def pictures_of_files(files: Sequence[str], task: Task, data: DataConfig, say: Callable[[str], None]) -> list[Picture]:
    """Reads image files; reports and leaves out those that do not open. Raises InputError if none does."""
    transform = task.eval_transform(data)
    found, problems = [], []
    for file in files:
        try:
            image = Decoder(data.max_pixels).image(Path(file), file)
        except Unusable as problem:
            problems.append(str(problem))
            continue
        found.append(_picture(Path(file).name, transform(image, None)["pixel_values"], image.shape[-2:], data))
    if not found:
        raise InputError([*problems, "--images: expected at least one image that opens, got none"])
    for text in problems:
        say(f"left out: {text}")
    return found


def pictures_of_recipe(recipe: Recipe, count: int) -> list[Picture]:
    """Images spread over the recipe's test split, else its validation split. Raises InputError if it is unreadable."""
    config = replace(recipe.data, check="none", cache=False, on_error="skip")
    task = TASKS[recipe.task]  # its labels are read in each phase, also for one without a task loss
    try:
        _, data = task.from_data(config, labelled=task.takes_labels, splits=("eval", "test"))
    except InputError as error:
        hint = "no --images were given and the recipe's own data cannot be read; give --images, or data.path=..."
        raise InputError([*error.problems, hint]) from error
    dataset = data.test if data.test is not None else data.eval
    if dataset is None:
        raise InputError("data: expected a split to show, found none; give --images, or name it with data.test_split")
    if not isinstance(dataset, ImageDataset):  # a stream has neither names nor a length
        values = [sample["pixel_values"] for sample in sample_evenly(dataset, count)]
        return [
            _picture(f"image {n}", value, value.shape[-2:], recipe.data) for n, value in enumerate(values, start=1)
        ]
    found = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
        name = "/".join(Path(dataset.source.name(dataset.indices[index])).parts[-2:])
        size = dataset.raw(index).image.shape[-2:]
        found.append(_picture(name, dataset[index]["pixel_values"], size, recipe.data))
    return found


def padded(picture: Picture, task: Task, data: DataConfig) -> Picture:
    """The picture as in the task's batches: padded at the right and the bottom for models that need multiples."""
    pixel_values = task.collate([{"pixel_values": picture.pixel_values}])["pixel_values"][0]
    if pixel_values.shape == picture.pixel_values.shape:
        return picture
    before, now = picture.pixel_values.shape[1:], pixel_values.shape[1:]
    size = [round(own * new / old) for own, new, old in zip(picture.size, now, before, strict=True)]
    return _picture(picture.name, pixel_values, size, data)


def _picture(name: str, pixel_values: Tensor, size: Sequence[int], data: DataConfig) -> Picture:
    image = denormalize(pixel_values, data.image_mean, data.image_std)
    return Picture(name, pixel_values, (size[0], size[1]), image)
