"""The labels that a detector takes, for data sets that were not read by this package."""

from collections.abc import Mapping
from typing import Any

import torch

from cankd_hf.data.common.files import shown

TRAINED = ("class_labels", "boxes")
SCORED = (*TRAINED, "iscrowd", "size", "orig_size")
LOOSE = 0.05  # boxes may reach so far beyond the image, as a share of its side


def objects_problem(labels: Any, classes: int, scored: bool, masked: tuple[int, int] | None = None) -> str | None:
    """What is wrong with the labels of one image, if anything.

    Args:
        labels: as `detection_labels` makes them, and the image processors of `transformers`.
        classes: K; the class labels are 0..K-1.
        scored: whether they are used for scores, which need more keys.
        masked: height and width of the image, where each object needs a mask.
    """
    needed = (SCORED if scored else TRAINED) + (("masks",) if masked else ())
    if not isinstance(labels, Mapping) or not set(needed) <= set(labels):
        got = f"the keys {shown(list(labels))}" if isinstance(labels, Mapping) else type(labels).__name__
        return f"labels: expected a dict with {', '.join(needed)}, got {got}; an image processor makes them"
    kinds, boxes = labels["class_labels"], labels["boxes"]
    if not isinstance(kinds, torch.Tensor) or kinds.dtype != torch.int64 or kinds.ndim != 1:
        return f"labels.class_labels: expected class ids [n] as int64, got {_described(kinds)}"
    if not isinstance(boxes, torch.Tensor) or not boxes.is_floating_point() or boxes.shape[1:] != (4,):
        return f"labels.boxes: expected boxes [n, 4] as floating point numbers, got {_described(boxes)}"
    if len(kinds) != len(boxes):
        return f"labels: expected one class for each box, got {len(kinds)} class_labels and {len(boxes)} boxes"
    strange = kinds[(kinds < 0) | (kinds >= classes)]
    if len(strange):
        return (
            f"labels.class_labels: expected ids 0..{classes - 1}, got {strange.unique()[:8].tolist()}; correct the "
            "labels, or the number of classes"
        )
    if masked and (problem := _mask_problem(labels["masks"], len(boxes), masked)):
        return problem
    return _box_problem(boxes.detach().cpu().double())


def _mask_problem(masks: Any, count: int, size: tuple[int, int]) -> str | None:
    """What is wrong with the masks of an image of this size, if anything."""
    wanted = f"labels.masks: expected masks [n, H, W] of 0 and 1, here [{count}, {size[0]}, {size[1]}]"
    if not isinstance(masks, torch.Tensor) or tuple(masks.shape) != (count, *size):
        return f"{wanted}, got {_described(masks)}"
    if masks.is_floating_point() or (masks.numel() and (masks.min() < 0 or masks.max() > 1)):
        return f"{wanted}, got {_described(masks)} with other numbers"
    return None


def _box_problem(boxes: torch.Tensor) -> str | None:
    """What is wrong with boxes [n, 4], if anything."""
    wanted = "labels.boxes: expected centre x, centre y, width, height in 0..1 of the image"
    if not len(boxes):
        return None
    if not boxes.isfinite().all():
        return f"{wanted}, got {shown(boxes[~boxes.isfinite().all(1)][0].tolist())}"
    outside = ((boxes < -LOOSE) | (boxes > 1 + LOOSE)).any(1)
    if outside.any():
        return f"{wanted}, got {shown(boxes[outside][0].tolist())}; divide pixels by the image's width and height"
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    beyond = ((low < -LOOSE) | (high > 1 + LOOSE)).any(1)
    if beyond.any() and (boxes[:, 2:] > boxes[:, :2]).all():
        return f"{wanted}, got what looks like two corners: {shown(boxes[beyond][0].tolist())}; convert them"
    if (boxes[:, 2:] <= 0).any():
        return f"{wanted}, got a box without area: {shown(boxes[(boxes[:, 2:] <= 0).any(1)][0].tolist())}; drop it"
    return None


def _described(value: Any) -> str:
    return f"{value.dtype} of the shape {list(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
