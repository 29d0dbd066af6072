"""Label files of YOLO: one line an object, in shares of the image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cankd_hf.data.common.files import read_lines, shown
from cankd_hf.data.detection.objects import Annotation, read_annotation
from cankd_hf.errors import InputError

SLACK = 0.01  # of the image, by which tools write coordinates beyond its border
MOST = 100_000  # classes
SHAPE = "class x_center y_center width height"


@dataclass(frozen=True)
class Line:
    """An object: its class and its outline or box, in shares of the image."""

    place: str  # file and line
    label: int
    numbers: tuple[float, ...]  # x, y of the centre, width, height; or x and y of three corners or more

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of its box."""
        if len(self.numbers) == 4:
            x, y, width, height = self.numbers
            return x - width / 2, y - height / 2, x + width / 2, y + height / 2
        across, down = self.numbers[::2], self.numbers[1::2]
        return min(across), min(down), max(across), max(down)

    def outline(self, size: tuple[int, int]) -> list[list[float]]:
        """Its outline in pixels of an image of `size` (width, height); [] for a box."""
        if len(self.numbers) == 4:
            return []
        return [[number * size[place % 2] for place, number in enumerate(self.numbers)]]


def label_lines(file: Path, place: str, keypoints: int = 0) -> tuple[list[Line], list[str]]:
    """The objects of a label file, and a problem for each line that is none.

    Args:
        file: the file.
        place: its name in messages.
        keypoints: how many numbers of key points follow each box.
    """
    found, problems = [], []
    try:
        lines = list(enumerate(read_lines(file), start=1))
    except InputError as error:
        return [], [problem.replace(str(file), place, 1) for problem in error.problems]
    for number, line in lines:
        if words := line.split():
            read = _line(words, f"{place} line {number}", keypoints)
            if isinstance(read, Line):
                found.append(read)
            else:
                problems.append(read)
    return found, problems


def annotation_of(
    lines: Sequence[Line],
    problems: Sequence[str],
    name: str,
    classes: Mapping[int, int],
    image_id: int,
    size: tuple[int, int],
    masked: bool = False,
) -> Annotation:
    """The objects of an image of `size` (width, height) in its pixels, with their outlines if `masked`, and the
    problems of its lines."""
    width, height = size
    wrong = unknown(lines, classes)
    known = [line for line in lines if line.label in classes]
    boxes = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in (one.corners for one in known)]
    objects: dict[str, list[Any]] = {"bbox": boxes, "category": [line.label for line in known]}
    if masked:
        objects["segmentation"] = [line.outline(size) for line in known]
    read = read_annotation(objects, name, classes, "xyxy", image_id, masked=masked)
    return replace(read, faults=(*problems, *read.faults), wrong=tuple(wrong)) if problems or wrong else read


def unknown(lines: Sequence[Line], classes: Mapping[int, int]) -> list[str]:
    """A problem for each object of a class that is not known."""
    return [
        f"{line.place}: expected a class of {min(classes)}..{max(classes)}, got {line.label}"
        for line in lines
        if line.label not in classes
    ]


def _line(words: Sequence[str], place: str, keypoints: int) -> Line | str:
    """The object of a line, or what is wrong with it."""
    try:
        label, *numbers = map(float, words)
    except ValueError:
        return f"{place}: expected numbers, `{SHAPE}`, got {shown(' '.join(words))}"
    if not all(map(math.isfinite, (label, *numbers))):
        return f"{place}: expected numbers, `{SHAPE}`, got {shown(' '.join(words))}"
    if label != int(label) or not 0 <= label < MOST:
        return f"{place}: expected a whole number from 0 as class, got {words[0]}"
    if keypoints and len(numbers) == 4 + keypoints:
        numbers = numbers[:4]
    count = len(numbers)
    if count == 5:
        return f"{place}: expected 5 columns, `{SHAPE}`, got 6; drop the last, if it is the confidence of a prediction"
    if count != 4 and (count < 6 or count % 2):
        return (
            f"{place}: expected 5 columns, `{SHAPE}`, or a class and the corners of an outline (7, 9, ...), "
            f"got {count + 1}"
        )
    if strange := [number for number in numbers if not -SLACK <= number <= 1 + SLACK]:
        pixels = "; are they pixels? divide x and width by that of the image, y and height by its height"
        return f"{place}: expected shares of the image, from 0 to 1, got {shown(strange[0])}" + (
            pixels if max(map(abs, strange)) > 2 else ""
        )
    if count == 4 and min(numbers[2:]) < 0:
        return f"{place}: expected a width and a height from 0, got {numbers[2]:g} and {numbers[3]:g}"
    return Line(place, int(label), tuple(numbers))
