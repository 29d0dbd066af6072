"""The detections in a detector's predictions at all anchors, or of its queries."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from cankd_hf.errors import InputError

MOST = 100  # detections of an image
CANDIDATES = 1000  # of a dense detector, before those that overlap are suppressed
OVERLAP = 0.6  # of two boxes of a class, above which the weaker one is suppressed


@torch.no_grad()
def detections_in(
    dense: Mapping[str, Tensor] | None, queries: Mapping[str, Tensor] | None, classes: int
) -> dict[str, Tensor]:
    """Of each image the best, in that order: `scores` [B, M], 0 for none, `labels` [B, M] and `boxes` [B, M, 4]
    (corners in 0..1).

    Args:
        dense: of a dense detector, see `FPNObjectDetectionOutput`: `class_logits` [B, A, K], `boxes` [B, A, 4]
            (corners in 0..1), perhaps `quality` [B, A].
        queries: of other detectors: `class_logits` [B, N, K], or K + 1 with a softmax, `boxes` [B, N, 4] (centre and
            size in 0..1).
        classes: K.
    """
    given = queries if dense is None else dense
    if given is None:
        raise InputError("pseudo_boxes: the teacher gives no boxes; take a detector, or a loss on maps")
    logits, boxes = given["class_logits"].float(), given["boxes"].float()
    softmax = dense is None and logits.shape[-1] == classes + 1
    scores = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    if dense is None:
        boxes = box_convert(boxes, "cxcywh", "xyxy")
    elif "quality" in dense:
        scores = (scores * dense["quality"].float().sigmoid()[..., None]).sqrt()
    values, places = scores.flatten(1).topk(min(MOST if dense is None else CANDIDATES, scores[0].numel()))
    labels, rows = places % classes, places // classes
    boxes = boxes.gather(1, rows[..., None].expand(-1, -1, 4)).clamp(0, 1)
    if dense is None:
        return {"scores": values, "labels": labels, "boxes": boxes}
    # one suppression for all images: each pair of image and class is a group of its own
    groups = labels + classes * torch.arange(len(labels), device=labels.device)[:, None]
    kept = batched_nms(boxes.flatten(0, 1), values.flatten(), groups.flatten(), OVERLAP)
    best = torch.zeros_like(values).flatten().index_fill_(0, kept, 1.0).view_as(values) * values
    values, order = best.topk(min(MOST, best.shape[1]))
    return {
        "scores": values,
        "labels": labels.gather(1, order),
        "boxes": boxes.gather(1, order[..., None].expand(-1, -1, 4)),
    }
