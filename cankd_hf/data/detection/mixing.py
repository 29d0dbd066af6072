"""Objects of pictures that are mixed: a rectangle of one is pasted into another (CutMix, Yun et al. 2019, 1905.04899).

A box of the picture below stays if its centre does not lie under the rectangle, which then hides at most half of it; a
box of the pasted picture comes along if its centre lies in the rectangle and at least half of it does. What stays is
cut to what can be seen of it. Where there are masks they decide instead of the boxes: at least half of a mask is seen,
and a box that is cut is that around the rest of its mask.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

from cankd_hf.data.detection.collate import EACH, crowds_last
from cankd_hf.data.detection.masks import boxes_of

VISIBLE = 0.5  # the least part of a pasted object that is seen


def boxes_below(boxes: Tensor, rectangle: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [..., 4] under a rectangle [..., 4], all as corners: what is seen of them, and whether they stay [...]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    start, end = rectangle[..., :2], rectangle[..., 2:]
    centre = (low + high) / 2
    stays = ~((centre >= start) & (centre < end)).all(-1)
    # a side is cut where the rectangle hides it in its whole length: x where all of y is covered, and the other way
    covered = ((start <= low) & (end >= high)).flip(-1)
    left = torch.where(covered & (start <= low) & (end > low), end, low)
    right = torch.where(covered & (end >= high) & (start < high), start, high)
    seen = torch.cat([left, right], -1)
    return torch.where(stays[..., None], seen, boxes), stays


def boxes_pasted(boxes: Tensor, rectangle: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [..., 4] of the pasted picture, in the rectangle [..., 4]: what is seen of them, and whether they come
    along [...]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    start, end = rectangle[..., :2], rectangle[..., 2:]
    centre = (low + high) / 2
    seen = torch.cat([torch.maximum(low, start), torch.minimum(high, end)], -1)
    inside = (seen[..., 2:] - seen[..., :2]).clamp(min=0).prod(-1)
    comes = ((centre >= start) & (centre < end)).all(-1) & (inside >= VISIBLE * (high - low).prod(-1))
    return torch.where(comes[..., None], seen, boxes), comes


def mixed_labels(
    labels: Sequence[Mapping[str, Tensor] | None], plan: Sequence[Sequence[int]], size: tuple[int, int]
) -> list[Mapping[str, Tensor] | None]:
    """Labels of `detection_collate` for the mixed pictures of a batch.

    Args:
        labels: of each picture; None for those without. Partners both have some, or neither has.
        plan: for each picture (partner or -1, top, left, bottom, right), see `Batch`.
        size: height and width of the batch's pictures.
    """
    mixed: list[Mapping[str, Tensor] | None] = []
    for label, (partner, top, left, bottom, right) in zip(labels, plan, strict=True):
        other = labels[partner] if partner >= 0 else None
        if label is None or other is None:
            mixed.append(label)
            continue
        rectangle = torch.tensor([left / size[1], top / size[0], right / size[1], bottom / size[0]])
        own, stays = boxes_below(box_convert(label["boxes"], "cxcywh", "xyxy"), rectangle)
        pasted, comes = boxes_pasted(box_convert(other["boxes"], "cxcywh", "xyxy"), rectangle)
        if "masks" in label and "masks" in other:
            inside = torch.zeros(size, dtype=torch.bool)
            inside[top:bottom, left:right] = True
            label, own, stays = _masks_seen(label, ~inside)
            other, pasted, comes = _masks_seen(other, inside)
        made = {
            key: torch.cat([label[key][stays], other[key][comes]])
            for key in EACH
            if key in label and key in other and key != "outlines"  # of masks as they were
        }
        made["boxes"] = box_convert(torch.cat([own[stays], pasted[comes]]), "xyxy", "cxcywh")
        mixed.append(crowds_last({**label, **made}))
    return mixed


def _masks_seen(label: Mapping[str, Tensor], seen: Tensor) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
    """Labels with what is seen, bool [H, W], of their masks; boxes around it [n, 4], as corners; and whether an object
    stays [n]. The box of a mask that is seen whole remains as it is."""
    masks = label["masks"] & seen
    left, before = masks.flatten(1).sum(1), label["masks"].flatten(1).sum(1)
    around = boxes_of(masks) / torch.tensor([*seen.shape[::-1], *seen.shape[::-1]])
    boxes = torch.where((left == before)[:, None], box_convert(label["boxes"], "cxcywh", "xyxy"), around)
    return (
        {key: value for key, value in label.items() if key != "outlines"} | {"masks": masks},
        boxes,
        (left >= VISIBLE * before) & (left > 0),
    )
