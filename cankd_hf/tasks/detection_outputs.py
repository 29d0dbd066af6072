"""Detections of every family of detectors, read from their outputs and drawn beside the ground truth."""

from typing import Any

import numpy as np
import torch
from PIL import ImageDraw
from torch import Tensor
from torchvision.ops import box_convert
from transformers import PreTrainedModel

from cankd_hf.data.detection.collate import detection_collate
from cankd_hf.features.dense import SOFTMAX as SOFTMAX
from cankd_hf.features.inputs import input_rule
from cankd_hf.metrics.detection import MAX_DETECTIONS
from cankd_hf.models.prompts import PROMPTED, phrase_probabilities
from cankd_hf.tasks.pictures import fitted

THRESHOLD = 0.3  # detections with a lower score are not drawn, where no better threshold is known
DRAWN_WIDTH = 320  # least width of an image with boxes, in pixels


def detections(outputs: Any, sizes: Tensor, model_type: str, limit: int = MAX_DETECTIONS) -> list[dict[str, Tensor]]:
    """The detections of a detector of any family, as `best_pairs`, without those of score 0.

    Returns:
        For each image, best first: `scores` [n] above 0, `labels` [n] in 0..K-1, `boxes` [n, 4] as x0, y0, x1, y1.
    """
    return [
        {"scores": s[s > 0], "labels": y[s > 0], "boxes": b[s > 0]}
        for s, y, b in zip(*best_pairs(outputs, sizes, model_type, limit), strict=True)
    ]


def best_pairs(
    outputs: Any, sizes: Tensor, model_type: str, limit: int = MAX_DETECTIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of a box and a class, a fixed number: an accelerator is not waited for.

    Args:
        outputs: `logits` [B, N, K] (K + 1 for the families in `SOFTMAX`) and `pred_boxes` [B, N, 4] as centre x,
            centre y, width, height, in 0..1 of the batch's images; of the families in `PROMPTED` also `input_ids`.
        sizes: [B, 2], height and width that the boxes are scaled to.
        model_type: of the detector's config.
        limit: largest number of detections of an image.

    Returns:
        Best first: scores [B, n], labels [B, n] in 0..K-1 and boxes [B, n, 4] as x0, y0, x1, y1.
    """
    scores, labels, rows = best_rows(outputs, model_type, limit)
    boxes = box_convert(outputs["pred_boxes"].float(), "cxcywh", "xyxy")
    boxes = boxes * sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
    return scores, labels, boxes.gather(1, rows[..., None].expand(-1, -1, 4))


def best_rows(outputs: Any, model_type: str, limit: int = MAX_DETECTIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and the rows of the outputs [B, n] of `best_pairs`."""
    logits = outputs["logits"].float()
    if model_type in SOFTMAX:
        rated = logits.softmax(dim=-1)[..., :-1]
    elif model_type in PROMPTED:
        rated = phrase_probabilities(logits, outputs["input_ids"])
    else:
        rated = logits.sigmoid()
    scores, places = rated.flatten(1).topk(min(limit, rated[0].numel()))
    return scores, places % rated.shape[-1], places // rated.shape[-1]


def detections_of(output: Any) -> list[Tensor]:
    """Detections of our own detectors: scores [B, N], labels [B, N], -1 after the last, boxes [B, N, 4], corners."""
    scores, labels = output.logits.sigmoid().max(dim=-1)
    return [scores, torch.where(scores > 0, labels, -1), box_convert(output.pred_boxes, "cxcywh", "xyxy")]


@torch.no_grad()
def found_in(model: PreTrainedModel, pixel_values: Tensor, threshold: float) -> dict[str, Tensor]:
    """The detections of one image [3, H, W] with at least this score, boxes in its pixels; on the CPU."""
    rule = input_rule(model)
    batch = detection_collate([{"pixel_values": pixel_values}], rule.multiple if rule.strict else 1)
    padded = torch.tensor(batch["pixel_values"].shape[-2:])
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    found = detections(model(**inputs), padded[None], model.config.model_type)[0]
    return {key: value[found["scores"] >= threshold].cpu() for key, value in found.items()}


def draw_boxes(image: np.ndarray, boxes: Tensor, labels: Tensor, colours: np.ndarray) -> np.ndarray:
    """The image [H, W, 3], enlarged to a width of at least `DRAWN_WIDTH`, with boxes [n, 4] in colours [K, 3]."""
    height, width = image.shape[:2]
    factor = max(1, -(-DRAWN_WIDTH // width))
    page = fitted(image, (width * factor, height * factor))
    pen, line = ImageDraw.Draw(page), max(3, round(page.width / 110))
    for box, label in zip((boxes * factor).tolist(), labels.tolist(), strict=True):
        left, top, right, bottom = (round(value) for value in box)
        if right <= left or bottom <= top:
            continue
        # A dark line around the coloured one makes it visible on any background.
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black")
        pen.rectangle((left, top, right, bottom), outline=tuple(colours[label].tolist()), width=line)
    return np.asarray(page)
