"""What detectors of every family found, read off their outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from cankd_hf.metrics.detection import MAX_DETECTIONS
from cankd_hf.models.prompts import PROMPTED, phrase_probabilities

# Model types whose last class is "no object", under a softmax; all others, ours too, rate each class by a sigmoid
# (those that read a text: each word of each class).
SOFTMAX = {"detr", "table-transformer", "yolos"}


def detections(outputs: Any, sizes: Tensor, model_type: str, limit: int = MAX_DETECTIONS) -> list[dict[str, Tensor]]:
    """What a detector found, for every family alike: the best pairs of a box and a class.

    Args:
        outputs: `logits` [B, N, K] (one more for the families in `SOFTMAX`) and `pred_boxes` [B, N, 4] as centre x,
            centre y, width, height, in 0..1 of the batch's images; of the families in `PROMPTED` also `input_ids`.
        sizes: [B, 2], height and width that the shares are taken of.
        model_type: of the detector's config.
        limit: how many an image can have.

    Returns:
        For each image, best first: `scores` [n] above 0, `labels` [n] in 0..K-1, `boxes` [n, 4] as x0, y0, x1, y1.
    """
    logits = outputs["logits"].float()
    if model_type in SOFTMAX:
        rated = logits.softmax(dim=-1)[..., :-1]
    elif model_type in PROMPTED:
        rated = phrase_probabilities(logits, outputs["input_ids"])
    else:
        rated = logits.sigmoid()
    scores, places = rated.flatten(1).topk(min(limit, rated[0].numel()))
    labels, rows = places % rated.shape[-1], places // rated.shape[-1]
    boxes = box_convert(outputs["pred_boxes"].float(), "cxcywh", "xyxy")
    boxes = boxes * sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
    return [
        {"scores": s[s > 0], "labels": y[s > 0], "boxes": b[r[s > 0]]}
        for s, y, r, b in zip(scores, labels, rows, boxes, strict=True)
    ]


def detections_of(output: Any) -> list[Tensor]:
    """What our own detectors give: scores [B, N], labels [B, N], -1 after the last, and boxes [B, N, 4], corners."""
    scores, labels = output.logits.sigmoid().max(dim=-1)
    return [scores, torch.where(scores > 0, labels, -1), box_convert(output.pred_boxes, "cxcywh", "xyxy")]
