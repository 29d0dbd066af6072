"""The masks that a student of segmentation takes, for data sets that were not read by this package."""

from collections.abc import Sequence
from typing import Any

import torch


def mask_problem(labels: Any, size: Sequence[int], classes: int, ignore_index: int, scored: bool) -> str | None:
    """What is wrong with the mask of one sample, if anything.

    Args:
        labels: its mask; expected [H, W], int64.
        size: height and width of its image.
        classes: K; the labels are 0..K-1 and `ignore_index`.
        ignore_index: the label of void.
        scored: whether it is used in evaluation alone, where a mask may have a size of its own.
    """
    if not isinstance(labels, torch.Tensor):
        return f"labels: expected a mask [H, W] as a tensor, got {type(labels).__name__}; convert it"
    if labels.dtype != torch.int64:
        return f"labels: expected a mask of class ids as int64, got {labels.dtype}; convert it with .long()"
    if labels.ndim != 2:
        return f"labels: expected a mask [H, W], got the shape {list(labels.shape)}; drop the further dimensions"
    if not scored and tuple(labels.shape) != tuple(size):
        (height, width), (rows, columns) = size, labels.shape
        return (
            f"labels: expected a mask of the size of its image, {height} x {width}, got {rows} x {columns}; "
            "resize both alike"
        )
    strange = labels[(labels < 0) | (labels >= classes)]
    strange = strange[strange != ignore_index]
    if len(strange):
        return (
            f"labels: expected ids 0..{classes - 1} or {ignore_index} (void), got "
            f"{strange.unique()[:8].tolist()} in {len(strange)} pixels; correct the masks or the number of classes, "
            "or name another void by semantic_loss_ignore_index in the student's configuration"
        )
    return None
