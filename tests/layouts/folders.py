"""Makers of small folders of generated images, each of a layout that people have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from cankd_hf.config.data import DataConfig
from cankd_hf.data.segmentation.load import SegmentationData, load_segmentation
from cankd_hf.errors import InputError

SIZE = (40, 32)  # width, height
COLOURS = ((0, 0, 0), (200, 30, 30), (30, 30, 200))
Write = Callable[[Path, np.ndarray], None]  # (path without ending, labels [h, w]) -> a mask file


def scene(seed: int, classes: int = 3, size: tuple[int, int] = SIZE) -> tuple[Image.Image, np.ndarray]:
    """A picture with a rectangle of each class but 0, and its labels [h, w]."""
    draw = np.random.default_rng(seed)
    width, height = size
    labels = np.zeros((height, width), np.uint8)
    for label in range(1, classes):
        top, left = draw.integers(0, height // 2), draw.integers(0, width // 2)
        labels[top : top + height // 3, left : left + width // 3] = label
    colours = np.array([COLOURS[label % 3] for label in range(max(classes, 3))], np.int64)
    pixels = colours[labels] + draw.integers(0, 40, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), labels


def grey(path: Path, labels: np.ndarray) -> None:
    """A mask of one channel."""
    Image.fromarray(labels).save(path.with_name(path.name + ".png"))


def black_white(path: Path, labels: np.ndarray) -> None:
    """A mask of 0 and 255."""
    grey(path, (labels > 0).astype(np.uint8) * 255)


def coloured(path: Path, labels: np.ndarray, mode: str = "RGB") -> None:
    """A mask of colours."""
    picture = Image.fromarray(np.array(COLOURS, np.uint8)[labels])
    picture.convert(mode).save(path.with_name(path.name + ".png"))


def indexed(path: Path, labels: np.ndarray, colours: Sequence[Sequence[int]] = COLOURS) -> None:
    """A mask of indices into a palette."""
    picture = Image.new("P", labels.shape[::-1])
    picture.putdata(labels.reshape(-1).tolist())
    picture.putpalette([part for colour in colours for part in colour])
    picture.save(path.with_name(path.name + ".png"))


def turned(path: Path, picture: Image.Image) -> None:
    """A JPEG that lies on its side and says so in its EXIF; upright it is `picture`."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def pairs(
    images: Path, masks: Path, count: int = 4, write: Write = grey, classes: int = 3, first: int = 0, stem: str = "{}"
) -> None:
    """Images and masks with equal stems in two folders."""
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture, labels = scene(number, classes)
        name = stem.format(f"{number:03d}")
        picture.save(images / f"{name}.jpg", quality=95)
        write(masks / name, labels)


def load(root: Path, **settings: Any) -> SegmentationData:
    """The set at a path, with what is usual for the rest."""
    return load_segmentation(DataConfig(path=str(root), **settings))


def problems(root: Path, **settings: Any) -> list[str]:
    """What is said of a set that cannot be used."""
    with pytest.raises(InputError) as caught:
        load(root, **settings)
    return caught.value.problems


def labels_at(data: Any, index: int) -> np.ndarray:
    """The labels of one image, as they are decoded."""
    return np.asarray(data.raw(index).label)


def own(name: str) -> np.ndarray:
    """The labels that the image of this name was made with."""
    return scene(int("".join(filter(str.isdigit, Path(name).stem))))[1]
