"""Pixels of masks as COCO's compressed run lengths, and back; for data, scores and labels alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def decoded(counts: Sequence[bytes], height: int, width: int) -> np.ndarray:
    """The pixels of n objects, bool [n, height, width], from their compressed run lengths."""
    if not counts:
        return np.zeros((0, height, width), bool)
    pixels = _library().decode([{"size": [height, width], "counts": one} for one in counts])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(bool)


def encoded(masks: np.ndarray) -> list[bytes]:
    """The compressed run lengths of n objects, from their pixels, bool [n, H, W]."""
    if not len(masks):
        return []
    found = _library().encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [one["counts"] if isinstance(one["counts"], bytes) else one["counts"].encode("ascii") for one in found]


def _library() -> Any:
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        from pycocotools import mask
    return mask
