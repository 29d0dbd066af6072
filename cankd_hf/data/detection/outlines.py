"""Outlines of objects, kept in a few arrays."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from cankd_hf.data.common.files import shown


class Outlines:
    """The `segmentation` of COCO annotations, in their order: polygons in a few arrays, run lengths as they are."""

    def __init__(self) -> None:
        self.points = array("d")  # x, y, x, y ...
        self.rings = array("q", [0])  # ends of the polygons in `points`
        self.ends = array("q", [0])  # ends of the objects in `rings`
        self.lengths: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, given: Any) -> None:
        """The next object; what is no outline, as of an object with a box alone, is none."""
        if isinstance(given, dict) and given:
            self.lengths[len(self)] = given
        elif isinstance(given, list | tuple) and given:
            rings = given if isinstance(given[0], list | tuple) else [given]
            for ring in rings if all(map(_is_ring, rings)) else ():
                self.points.extend(map(float, ring))
                self.rings.append(len(self.points))
        self.ends.append(len(self.rings) - 1)

    def has(self, place: int) -> bool:
        """Whether an object has an outline."""
        return place in self.lengths or self.ends[place] < self.ends[place + 1]

    def draw(self, place: int, height: int, width: int, scale: Sequence[float] = (1, 1)) -> np.ndarray:
        """The pixels of an object, bool [height, width], its points multiplied by `scale` (of x, of y).

        Raises:
            ValueError: for run lengths that do not fit.
        """
        from faster_coco_eval.core import mask

        shape: Any = self.lengths.get(place)
        if shape is None:
            ends = self.rings[self.ends[place] : self.ends[place + 1] + 1]
            parts = zip(ends, ends[1:], strict=False)
            shape = [(np.array(self.points[a:b]).reshape(-1, 2) * scale).reshape(-1).tolist() for a, b in parts]
        elif not _fit(shape, height, width):
            raise ValueError(f"run lengths of the size {shown(shape.get('size'))}, of an image of {height} x {width}")
        try:
            pixels: np.ndarray = mask.decode(mask.segmToRle(shape, width, height)).astype(bool)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        return pixels.reshape(height, width)


def _fit(given: dict[str, Any], height: int, width: int) -> bool:
    """Whether run lengths are those of an image; compressed ones show it when they are decoded."""
    counts = given.get("counts")
    if given.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        return all(type(count) is int and 0 <= count <= height * width for count in counts)
    return isinstance(counts, str) and counts.isascii()


def _is_ring(ring: Any) -> bool:
    """Whether a list holds the corners of a polygon."""
    return (
        isinstance(ring, list | tuple)
        and len(ring) >= 6
        and len(ring) % 2 == 0
        and all(
            isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e7 for number in ring
        )
    )
