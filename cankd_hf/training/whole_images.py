"""Stored answers of teachers for whole images, from which those of all crops are cut."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from cankd_hf.data.common.batch import content_hash, oriented
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.transforms import ImageTransform
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import InputRule
from cankd_hf.features.taps import Level
from cankd_hf.teachers.pictures import Grid
from cankd_hf.training.placing import TeacherShape

TOGETHER = 16  # images that are stored together by `cankd cache`


def identifying(dataset: Any) -> Any:
    """The training set, whose items have a hash of their whole image.

    Raises:
        InputError: for one whose items do not tell where their image is.
    """
    if type(dataset) is WithUnlabelled:
        return WithUnlabelled(identifying(dataset.labelled), identifying(dataset.unlabelled), dataset.ratio)
    if not _tells_places(dataset):
        given = type(dataset.transform if type(dataset) is ImageDataset else dataset).__name__
        raise InputError(
            "teacher.cache.whole: expected images in a folder or table that a recipe's transform crops, which says "
            f"where in the image a crop is, got {given}, which does not; set views: 16 instead"
        )
    return dataset.identifying()


def check_needs(place: str, needs: set[str], shape: TeacherShape) -> None:
    """Raises InputError for answers that cannot be cut: those that are not maps."""
    bad = {name for name in needs if not (name.startswith("maps.") or name == "logits")}
    if "logits" in needs and len(shape.logits or ()) != 4:
        bad.add("logits of whole images")
    if bad:
        raise InputError(
            f"{place}.whole: expected terms that read maps or logits of pixels, which can be cut, got terms that read "
            f"{', '.join(sorted(bad))}; set views: 16 instead"
        )


def coarsest(levels: list[Level], rule: InputRule) -> int:
    """What sides of whole images are rounded up to a multiple of: the coarsest stride, so that maps cover all of an
    image and nothing else."""
    stride = max((level.stride for level in levels), default=32.0)
    if rule.multiple >= 0.9 * stride:
        return rule.multiple
    return int(2 ** math.ceil(math.log2(stride) - 0.01))  # measured on sides that are no multiple, it is less


def _tells_places(dataset: Any) -> bool:
    """Whether items can tell where their image is; a transform of the user's own may move it otherwise."""
    transform = dataset.transform if type(dataset) is ImageDataset else None
    own = type(transform).__module__.startswith("cankd_hf.")
    return own and isinstance(transform, ImageTransform) and transform.places


def _parts(dataset: Any) -> tuple[Any, ...]:
    return (dataset.labelled, dataset.unlabelled) if type(dataset) is WithUnlabelled else (dataset,)


def _one(dataset: Any, number: int) -> tuple[ImageDataset, int]:
    if type(dataset) is WithUnlabelled:
        return dataset.half(number)
    return dataset, number


def whole_image(dataset: Any, number: int, multiple: int) -> Tensor:
    """An image of a training set as teachers see it whole: at scale 1, its sides rounded up to a multiple.

    Args:
        dataset: see `identifying`.
        number: of the image.
        multiple: see `coarsest`.

    Returns:
        float32 `[3, H, W]`, normalised for the student.
    """
    data, number = _one(dataset, number)
    transform: Any = data.transform
    assert isinstance(transform, ImageTransform)
    image = data.usable(number).image
    size = [-(-side // multiple) * multiple for side in transform.size_of_scale_one(image.shape[-2:])]
    if list(image.shape[-2:]) != size:
        image = F.resize_image(image, size, antialias=True)
    return transform.normalize(image)


def whole_share(dataset: Any, size: tuple[int, int]) -> float | None:
    """Pixels of a whole image in those of a picture.

    Args:
        dataset: the training set.
        size: height and width of the pictures.

    Returns:
        None for a set whose items do not tell where their image is, see `identifying`.
    """
    parts = _parts(dataset)
    if not all(map(_tells_places, parts)):
        return None
    height, width = parts[0].transform.size_of_scale_one(parts[0].usable(0).image.shape[-2:])
    return float(height * width) / (size[0] * size[1])


def orientations(dataset: Any) -> int:
    """2 where images are mirrored at random, else 1."""
    return 2 if any(part.transform.flips for part in _parts(dataset)) else 1


def sizing(dataset: Any) -> list[Any]:
    """What decides the size of images at scale 1, for each part of a training set, as JSON holds it."""
    return [json.loads(json.dumps(part.transform.base)) for part in _parts(dataset)]


def grids_of(
    shape: TeacherShape, measured: tuple[int, int], canvas: tuple[int, int], resized: bool
) -> dict[str, Grid]:
    """The grid of each field of an answer for pictures.

    Args:
        shape: of the teacher.
        measured: height and width of the images that it was measured with.
        canvas: height and width of the pictures.
        resized: whether the teacher resizes its images, so that its maps cover all of them and nothing else.
    """

    def grid(cells: tuple[int, int]) -> Grid:
        stride = None if resized else _stride(cells, measured)
        if stride is not None:
            height, width = (-(-side // stride) for side in canvas)
            return Grid((height, width), (height * stride, width * stride))
        strides = (-(-own // count) for count, own in zip(cells, measured, strict=True))
        height, width = (-(-side // each) for side, each in zip(canvas, strides, strict=True))
        return Grid(cells if canvas == measured else (height, width), canvas)

    found = {f"maps.{number}": grid(level.size) for number, level in enumerate(shape.levels)}
    if shape.logits is not None and len(shape.logits) == 4:
        found["logits"] = grid((shape.logits[-2], shape.logits[-1]))
    return found


def _stride(cells: tuple[int, int], size: tuple[int, int]) -> int | None:
    """The power of two at which images of a size have so many cells, the last ones of each side cut off; None if there
    is none."""
    strides = (2**power for power in range(8))
    return next((one for one in strides if tuple(-(-side // one) for side in size) == tuple(cells)), None)


def all_of(dataset: Any, rank: int, world: int) -> Iterator[tuple[list[bytes], Tensor, Tensor]]:
    """Identities, numbers and places of all images of a training set, in every orientation, some at a time.

    Args:
        dataset: see `identifying`.
        rank: number of this process, which goes through a share of them.
        world: number of processes.
    """
    numbers = list(range(rank, len(dataset), world))
    for start in range(0, len(numbers), TOGETHER):
        some = numbers[start : start + TOGETHER]
        contents = []
        for number in some:
            data, own = _one(dataset, number)
            contents.append(content_hash(data.usable(own).image))
        for mirrored in range(orientations(dataset)):
            place = torch.tensor([[0.0, 0.0, 1.0, 1.0, float(mirrored)]]).repeat(len(some), 1)
            yield [oriented(one, bool(mirrored)) for one in contents], torch.tensor(some), place
