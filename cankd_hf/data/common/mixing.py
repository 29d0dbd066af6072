"""What is done to the student's pictures of a batch alone: rectangles erased, and pasted from one into another.

Both are drawn with the sample, see `Drawn`, and done where samples become a batch. Rectangles are multiples of the
coarsest stride that is compared, so that feature maps, logits and masks are cut exactly where pictures are.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

Rectangle = tuple[int, int, int, int]  # top, left, bottom, right
NOWHERE = (-1, 0, 0, 0, 0)  # the row of `meta["mix"]` of a picture into which nothing is pasted


class Shape(NamedTuple):
    """A rectangle, free of the size of its picture."""

    area: float  # its part of the picture
    aspect: float  # height by width
    top: float  # 0..1, of the positions that it may have
    left: float

    def within(self, height: int, width: int, stride: int) -> Rectangle | None:
        """The rectangle in a picture, in multiples of `stride`; None in one that is smaller than that."""
        cells = height // stride, width // stride
        if not all(cells):
            return None
        root = sqrt(self.area * height * width)
        wanted = root * sqrt(self.aspect), root / sqrt(self.aspect)
        sizes = [min(max(1, round(long / stride)), most) for long, most in zip(wanted, cells, strict=True)]
        top, left = (
            min(int(place * (most - size + 1)), most - size)
            for place, most, size in zip((self.top, self.left), cells, sizes, strict=True)
        )
        return top * stride, left * stride, (top + sizes[0]) * stride, (left + sizes[1]) * stride


class Drawn(NamedTuple):
    """What was drawn for the student's picture of a sample, to be done with its batch; None: nothing."""

    cut: Shape | None = None  # pasted from its partner
    erased: tuple[Shape, ...] = ()


def partners(labelled: Sequence[bool]) -> list[int]:
    """The row whose picture is pasted into each row: its neighbour in the same half of the batch, or -1.

    Rows 2i and 2i + 1 of a half are partners, so that several processes see the pairs that one would.
    """
    found = [-1] * len(labelled)
    for half in (True, False):
        rows = [row for row, value in enumerate(labelled) if value == half]
        for one, other in zip(rows[::2], rows[1::2], strict=False):
            found[one], found[other] = other, one
    return found


def mix_plan(
    drawn: Sequence[Drawn], sizes: Sequence[Sequence[int]], labelled: Sequence[bool], stride: int
) -> list[tuple[int, int, int, int, int]]:
    """For each row of a batch (partner or -1, top, left, bottom, right), within the pictures of both."""
    plan = []
    for row, partner in enumerate(partners(labelled)):
        cut = drawn[row].cut
        if partner < 0 or cut is None:
            plan.append(NOWHERE)
            continue
        height, width = (min(sizes[row][axis], sizes[partner][axis]) for axis in (0, 1))
        found = cut.within(height, width, stride)
        plan.append(NOWHERE if found is None else (partner, *found))
    return plan


def erase(
    values: Tensor, drawn: Sequence[Drawn], sizes: Sequence[Sequence[int]], stride: int, fill: Tensor | bool
) -> Tensor:
    """`values` [B, ..., H, W] with the erased rectangles set to `fill`."""
    found = [
        (row, *rectangle)
        for row, (one, size) in enumerate(zip(drawn, sizes, strict=True))
        for shape in one.erased
        if (rectangle := shape.within(size[0], size[1], stride)) is not None
    ]
    erased = values.clone() if found else values
    for row, top, left, bottom, right in found:
        erased[row, ..., top:bottom, left:right] = fill
    return erased


def paste(values: Tensor, plan: Sequence[Sequence[int]]) -> Tensor:
    """`values` [B, ..., H, W] with the rectangles of a plan pasted from the partners, as they were before."""
    if all(partner < 0 for partner, *_ in plan):
        return values
    mixed = values.clone()
    for row, (partner, top, left, bottom, right) in enumerate(plan):
        if partner >= 0:
            mixed[row, ..., top:bottom, left:right] = values[partner, ..., top:bottom, left:right]
    return mixed


def within_areas(areas: Sequence[Rectangle], canvas: Sequence[int]) -> Tensor | None:
    """Whether each pixel of a batch belongs to a picture, bool [B, H, W]; None if all do."""
    whole = (0, 0, *canvas)
    if all(tuple(area) == whole for area in areas):
        return None
    inside = torch.zeros(len(areas), *canvas, dtype=torch.bool)
    for row, (top, left, bottom, right) in enumerate(areas):
        inside[row, top:bottom, left:right] = True
    return inside
