"""Masks of detections and objects as text that can be gathered, beside the tables of `metrics.detection`.

A mask is written as COCO's compressed run lengths, some 100 bytes each, so that no pixels are kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cankd_hf.metrics.detection import MAX_DETECTIONS, PADDING, detection_tables
from cankd_hf.run_lengths import encoded

FILL = int(PADDING)  # after the last byte
BOXES, MASKS = "boxes", "masks"  # names of the statistics


@torch.no_grad()
def instance_statistics(
    detections: Iterable[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, Tensor]:
    """Reduce detections with masks and their ground truth to small statistics of each image.

    Args:
        detections: for each image `scores` [n], `labels` [n] in 0..K-1, `boxes` [n, 4] as x0, y0, x1, y1 and `masks`
            bool [n, H, W], in pixels of the data set's image. They are taken one image after the other: a generator
            keeps the pixels of one image in memory. A detection with a number that is not finite is dropped.
        targets: for each image, as for `detection_statistics`, and of each object the mask: `masks` bool [m, H, W] in
            pixels of the data set's image.
        max_detections: the best so many of an image are kept.

    Returns:
        `boxes`, as `detection_statistics` gives them, and `masks` int8 [B, L]: the height and width of each image, and
        the run lengths of the masks in the order of the table, as text, filled up with -100.

    Raises:
        ValueError: if there are not as many detections as targets.
    """
    rows, texts = [], []
    for found, target in zip(detections, targets, strict=True):
        chosen = _chosen(found, max_detections)
        values = (found["labels"][chosen, None].float(), found["scores"][chosen, None].float(), found["boxes"][chosen])
        rows.append(torch.cat([part.float() for part in values], 1))
        lengths = [*encoded(found["masks"][chosen].cpu().numpy()), *target_lengths(target)]
        texts.append(_text(_size(target), lengths).to(found["scores"].device))
    if not targets:
        return {BOXES: torch.zeros(0, max_detections, 7), MASKS: torch.zeros(0, 0, dtype=torch.int8)}
    tables = detection_tables(pad_sequence(rows, batch_first=True, padding_value=torch.nan), targets, max_detections)
    return {BOXES: tables, MASKS: pad_sequence(texts, batch_first=True, padding_value=FILL)}


def target_lengths(target: Mapping[str, Tensor]) -> list[bytes]:
    """The run lengths of the objects of an image: those that its labels bring, else those of its `masks`."""
    if "outlines" in target:
        values = target["outlines"].cpu().numpy().astype(np.int8)
        return [row[row != FILL].tobytes() for row in values]
    return encoded(target["masks"].cpu().numpy())


def segmentations(text: np.ndarray) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """Height and width of an image, and the run lengths of its masks as COCO's tools take them."""
    first, *lengths = text[text != FILL].astype(np.int8).tobytes().split(b"\n")
    height, width = map(int, first.split()) if first else (0, 0)
    return (height, width), [{"size": [height, width], "counts": one} for one in lengths]


def _chosen(found: Mapping[str, Tensor], limit: int) -> Tensor:
    """Places of the best detections without a number that is not finite, best first."""
    finite = found["scores"].isfinite() & found["boxes"].isfinite().all(1)
    order = found["scores"].where(finite, -torch.inf).argsort(descending=True, stable=True)[:limit]
    return order[finite[order]]


def _size(target: Mapping[str, Tensor]) -> list[int]:
    sides: list[int] = target["orig_size"].tolist() if "orig_size" in target else list(target["masks"].shape[-2:])
    return sides


def _text(size: Sequence[int], lengths: Sequence[bytes]) -> Tensor:
    content = b"\n".join([b"%d %d" % (size[0], size[1]), *lengths])
    return torch.from_numpy(np.frombuffer(content, np.int8).copy())
