"""Overlap of boxes, pair by pair."""

import torch
from torch import Tensor

EPS = 1e-12  # least area, in 0..1 of an image: far below that of a pixel


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union, -1..1 (Rezatofighi et al. 2019), of boxes `[..., 4]` as corners."""
    shared, union = _areas(a, b)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return shared / union.clamp_min(EPS) - (hull - union) / hull.clamp_min(EPS)


def covered(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union, 0..1, of boxes `[..., 4]` as corners."""
    shared, union = _areas(a, b)
    return shared / union.clamp_min(EPS)


def corners(boxes: Tensor) -> Tensor:
    """Boxes `[..., 4]` as centre x, centre y, width and height -> as corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The area that two boxes share, and that of both together."""
    first, last = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (last - first).clamp_min(0).prod(-1)
    return shared, _area(a) + _area(b) - shared


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)
