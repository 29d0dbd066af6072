"""Outlines of objects, kept in a few arrays, and their pixels."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from cankd_hf.data.common.files import shown
from cankd_hf.run_lengths import decoded

LONGEST = 2**15  # side of an image in pixels
WANTED = "expected polygons ([[x, y, x, y, ...]], of three corners or more) or run lengths ({'size', 'counts'})"


class Outlines:
    """The `segmentation` of COCO annotations, in their order: polygons in a few arrays, run lengths as they are."""

    def __init__(self) -> None:
        self.points = array("d")  # x, y, x, y ...
        self.rings = array("q", [0])  # ends of the polygons in `points`
        self.ends = array("q", [0])  # ends of the objects in `rings`
        self.lengths: dict[int, dict[str, Any]] = {}
        self.strange: dict[int, Any] = {}  # what is neither, and not empty

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, given: Any) -> None:
        """The next object; what is no outline, as of an object with a box alone, is none."""
        if isinstance(given, dict) and given:
            self.lengths[len(self)] = given
        else:
            rings = rings_of(given)
            if given and not rings:
                self.strange[len(self)] = given
            for ring in rings:
                self.points.extend(map(float, ring))
                self.rings.append(len(self.points))
        self.ends.append(len(self.rings) - 1)

    def has(self, place: int) -> bool:
        """Whether an object has an outline."""
        return place in self.lengths or self.ends[place] < self.ends[place + 1]

    def usable(self, place: int) -> bool:
        """Whether an object has an outline without a problem."""
        return self.has(place) and (place not in self.lengths or outline_problem(self.lengths[place]) is None)

    def given(self, place: int, scale: Sequence[float] = (1, 1)) -> Any:
        """What was added for an object, the points of polygons multiplied by `scale` (of x, of y); [] for nothing."""
        if place in self.lengths:
            return self.lengths[place]
        if place in self.strange:
            return self.strange[place]
        ends = self.rings[self.ends[place] : self.ends[place + 1] + 1]
        parts = zip(ends, ends[1:], strict=False)
        return [(np.array(self.points[a:b]).reshape(-1, 2) * scale).reshape(-1).tolist() for a, b in parts]

    def draw(self, place: int, height: int, width: int, scale: Sequence[float] = (1, 1)) -> np.ndarray:
        """The pixels of an object, bool [height, width], its points multiplied by `scale` (of x, of y).

        Raises:
            ValueError: for run lengths that do not fit.
        """
        return decoded([run_lengths(self.given(place, scale), height, width)], height, width)[0]


def outline_problem(given: Any) -> str | None:
    """What is wrong with the `segmentation` of an object, as far as can be said without its image; None: nothing."""
    if isinstance(given, dict):
        size, counts = given.get("size"), given.get("counts")
        sides: list[Any] = list(size) if isinstance(size, list | tuple) else []
        good = len(sides) == 2 and all(type(side) is int and 0 < side < LONGEST for side in sides)
        return None if good and isinstance(counts, str | bytes | list) else f"{WANTED}, got {shown(given)}"
    if not given:
        return f"{WANTED}, got none"
    return None if rings_of(given) else f"{WANTED}, got {shown(given)}"


def rings_of(given: Any) -> list[Any]:
    """The polygons of a `segmentation`; empty if it has none, or one that is none."""
    if not isinstance(given, list | tuple) or not given:
        return []
    rings = list(given) if isinstance(given[0], list | tuple) else [given]
    return rings if all(map(_is_ring, rings)) else []


def box_around(given: Any) -> list[float]:
    """The box x, y, width, height of a `segmentation` without a problem."""
    if isinstance(given, dict):
        from faster_coco_eval.core import mask

        height, width = given["size"]
        encoded = {"size": [height, width], "counts": run_lengths(given, height, width)}
        return [float(number) for number in mask.toBbox(encoded)]
    points = np.concatenate([np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings_of(given)])
    return [*points.min(0).tolist(), *(points.max(0) - points.min(0)).tolist()]


def run_lengths(given: Any, height: int, width: int) -> bytes:
    """The `counts` of COCO's compressed run lengths of a `segmentation` in an image of this size.

    Raises:
        ValueError: for run lengths that do not fit.
    """
    from faster_coco_eval.core import mask

    if isinstance(given, dict) and not _fit(given, height, width):
        raise ValueError(f"run lengths of the size {shown(given.get('size'))}, of an image of {height} x {width}")
    try:
        made = mask.segmToRle(given, width, height)
        mask.decode(made)  # which alone sees compressed ones that do not fit
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    counts = made["counts"]
    return counts if isinstance(counts, bytes) else str(counts).encode("ascii")


def _fit(given: dict[str, Any], height: int, width: int) -> bool:
    """Whether run lengths are those of an image; compressed ones show it when they are decoded."""
    counts = given.get("counts")
    if given.get("size") != [height, width]:
        return False
    if isinstance(counts, list):
        return all(type(count) is int and 0 <= count <= height * width for count in counts)
    return isinstance(counts, str | bytes) and counts.isascii()


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
