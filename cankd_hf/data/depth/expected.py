"""The depth maps that a student takes, for data sets that were not read by this package."""

from collections.abc import Sequence
from typing import Any

import torch


def depth_problem(labels: Any, size: Sequence[int], scored: bool) -> str | None:
    """What is wrong with the depth map of one sample, if anything.

    Args:
        labels: expected [H, W] in metres, float32, 0 where the depth is not known.
        size: height and width of its image.
        scored: whether it is used in evaluation alone, where a depth map may have a size of its own.
    """
    if not isinstance(labels, torch.Tensor):
        return f"labels: expected a depth map [H, W] as a tensor, got {type(labels).__name__}; convert it"
    if not labels.is_floating_point():
        return f"labels: expected metres as float32, got {labels.dtype}; divide by the scale of the file"
    if labels.ndim != 2:
        return f"labels: expected a depth map [H, W], got the shape {list(labels.shape)}; drop the further dimensions"
    if not scored and tuple(labels.shape) != tuple(size):
        (height, width), (rows, columns) = size, labels.shape
        return (
            f"labels: expected a depth map of the size of its image, {height} x {width}, got {rows} x {columns}; "
            "resize both alike, the depth by its nearest neighbours"
        )
    if (labels < 0).any():
        return f"labels: expected metres, 0 where unknown, got {float(labels.min()):g}; set what is below 0 to 0"
    return None
