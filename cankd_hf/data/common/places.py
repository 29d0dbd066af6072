"""Where an image lies in a picture that shows a part of it, and maps of the image resampled there."""

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where an image lies in a picture of it.

    Attributes:
        seen: top, left, bottom and right of what can be seen of it, in whole pixels; around it is background.
        full: left, top, right and bottom of all of it, in pixels of the picture; it may go beyond the picture.
        mirrored: whether it is mirrored.
    """

    seen: tuple[int, int, int, int]
    full: tuple[float, float, float, float]
    mirrored: bool

    @property
    def told(self) -> tuple[float, ...]:
        """The place of all of it and whether it is mirrored, see `Batch`."""
        return (*self.full, float(self.mirrored))


def bilinear(centres: Tensor, first: float, last: float, cells: int) -> tuple[slice, Tensor]:
    """Bilinear resampling along one axis, as a product with a matrix; beyond the image its edge goes on.

    Args:
        centres: of the wanted cells, ascending, in pixels of the picture, float32 `[n]`.
        first: where the image begins, in pixels of the picture.
        last: where it ends.
        cells: of the map, which covers the image.

    Returns:
        The m cells of the map that are read, and their weights `[n, m]`.
    """
    at = ((centres - first) * (cells / (last - first)) - 0.5).clamp_(0, cells - 1)
    ends = at[:: max(1, len(at) - 1)].tolist()
    read = slice(int(ends[0]), min(int(ends[-1]) + 2, cells))
    apart = at[:, None] - torch.arange(read.start, read.stop, dtype=at.dtype)
    return read, apart.abs_().neg_().add_(1).clamp_(min=0)
