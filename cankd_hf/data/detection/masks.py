"""Masks of objects as tensors that can be collated: run lengths as rows of bytes, and boxes around masks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FILL = -100  # after the last byte, as the Trainer pads


def run_length_rows(counts: Sequence[bytes]) -> Tensor:
    """COCO's compressed run lengths of n objects as int8 [n, L], filled up with -100."""
    rows = np.full((len(counts), max(map(len, counts), default=0)), FILL, np.int8)
    for row, one in zip(rows, counts, strict=True):
        row[: len(one)] = np.frombuffer(one, np.int8)
    return torch.from_numpy(rows)


def run_lengths_in(rows: Tensor) -> list[bytes]:
    """The run lengths in rows [n, L] of any integer type."""
    values = rows.cpu().numpy().astype(np.int8)
    return [row[row != FILL].tobytes() for row in values]


def boxes_of(masks: Tensor) -> Tensor:
    """The boxes float32 [n, 4], x0, y0, x1, y1 in pixels, around masks [n, H, W]; zeros around one without a pixel."""
    seen = masks.bool()
    sides = []
    for inside in (seen.any(1), seen.any(2)):  # columns, then rows
        size = inside.shape[1]
        first = inside.int().argmax(1) if size else inside.new_zeros(len(inside))
        last = size - inside.flip(1).int().argmax(1) if size else first
        there = inside.any(1)
        sides.append((first.where(there, 0), last.where(there, 0)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).float()
