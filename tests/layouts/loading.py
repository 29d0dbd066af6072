"""What the tests of layouts read from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.load import DetectionData, load_detection
from cankd_hf.errors import InputError

from .box_folders import NAMES, PICTURES


def load(root: Path, **changes: Any) -> DetectionData:
    return load_detection(DataConfig(**({"path": str(root), "scale": [1.0, 1.0], "flip": 0.0} | changes)))


def problems_of(read: Callable[[], Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        read()
    return caught.value.problems


def objects(data: DetectionData) -> dict[str, list[tuple[str, list[float]]]]:
    """Stem of each image -> the names and boxes (x, y, width, height) of its objects."""
    found = {}
    for split in filter(None, (data.train, data.eval, data.test)):
        for index in range(len(split)):
            sample = split.raw(index)
            boxes = sample.target.boxes.clone()
            boxes[:, 2:] -= boxes[:, :2]
            names = [data.id2label[label] for label in sample.target.classes.tolist()]
            numbers = [[round(number, 3) for number in box] for box in boxes.tolist()]
            found[Path(sample.name).stem] = list(zip(names, numbers, strict=True))
    return found


EXPECTED = {
    picture.stem: [
        (NAMES[label], list(map(float, box))) for label, box in zip(picture.labels, picture.boxes, strict=True)
    ]
    for picture in PICTURES
}
