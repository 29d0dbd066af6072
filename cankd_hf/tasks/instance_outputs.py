"""Masks of detections, read from the outputs of every family, and drawn.

Every family's outputs have `logits` [B, N, K] and `pred_boxes` [B, N, 4], read as in `detection_outputs`, and
`pred_masks`: of the families in `IN_BOXES` logits [B, N, m, m] within the box of each row, of others logits
[B, N, h, w] of the whole picture with its padding.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_convert
from transformers import PreTrainedModel

from cankd_hf.data.detection.collate import detection_collate
from cankd_hf.features.inputs import input_rule
from cankd_hf.metrics.detection import MAX_DETECTIONS
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.tasks.detection_outputs import best_rows

PIXELS = 2**25  # of masks that are computed at one time
IN_BOXES = {FPNConfig.model_type}  # model types whose masks are those of their boxes


def instances(
    outputs: Any, canvases: Tensor, sizes: Sequence[tuple[int, int]], model_type: str, limit: int = MAX_DETECTIONS
) -> Iterator[dict[str, Tensor]]:
    """The detections of each image with their masks, one image after the other.

    Args:
        outputs: see above.
        canvases: [B, 2], height and width of the padded picture in the pixels that are wanted, see `original_sizes`.
        sizes: height and width of each image in these pixels, without padding.
        model_type: of the model's config.
        limit: largest number of detections of an image.

    Yields:
        Best first: `scores` [n] above 0, `labels` [n] in 0..K-1, `boxes` [n, 4] as x0, y0, x1, y1 and `masks` bool
        [n, H, W].
    """
    scores, labels, rows = best_rows(outputs, model_type, limit)
    for place, (canvas, size) in enumerate(zip(canvases, sizes, strict=True)):
        there = scores[place] > 0
        chosen = rows[place][there]
        scale = canvas.to(outputs["pred_boxes"].device, torch.float32).flip(0).repeat(2)
        boxes = box_convert(outputs["pred_boxes"][place].float(), "cxcywh", "xyxy")[chosen] * scale
        logits = outputs["pred_masks"][place][chosen].float()
        masks = in_boxes(logits, boxes, size) if model_type in IN_BOXES else in_picture(logits, canvas, size)
        yield {"scores": scores[place][there], "labels": labels[place][there], "boxes": boxes, "masks": masks}


def in_boxes(logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [n, m, m] within boxes [n, 4] -> masks bool [n, H, W], by torchvision's pasting."""
    if not len(boxes):
        return torch.zeros(0, *size, dtype=torch.bool, device=boxes.device)
    parts = zip(logits.sigmoid().split(_at_once(size)), boxes.split(_at_once(size)), strict=True)
    return torch.cat([paste_masks_in_image(masks[:, None], own, size)[:, 0] > 0.5 for masks, own in parts])


def in_picture(logits: Tensor, canvas: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [n, h, w] of the padded picture -> masks bool [n, H, W] of the image without its padding."""
    if not len(logits):
        return torch.zeros(0, *size, dtype=torch.bool, device=logits.device)
    whole = [max(round(side), least) for side, least in zip(canvas.tolist(), size, strict=True)]
    scaled = (
        interpolate(part[:, None], size=whole, mode="bilinear", align_corners=False)[:, 0, : size[0], : size[1]] > 0
        for part in logits.split(_at_once(size))
    )
    return torch.cat(list(scaled))


def _at_once(size: tuple[int, int]) -> int:
    """How many masks of an image of this size are floating point numbers at one time."""
    return max(1, PIXELS // (size[0] * size[1]))


@torch.no_grad()
def instances_in(model: PreTrainedModel, pixel_values: Tensor, threshold: float) -> dict[str, Tensor]:
    """The detections of one image [3, H, W] with at least this score, in its pixels; on the CPU."""
    rule = input_rule(model)
    batch = detection_collate([{"pixel_values": pixel_values}], rule.multiple if rule.strict else 1)
    padded = torch.tensor([batch["pixel_values"].shape[-2:]])
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    found = next(instances(model(**inputs), padded, [size], model.config.model_type))
    return {key: value[found["scores"] >= threshold].cpu() for key, value in found.items()}


def tinted(image: np.ndarray, masks: Tensor, labels: Tensor, colours: np.ndarray) -> np.ndarray:
    """The image [H, W, 3] in 0..1 with masks [n, H, W] in the colours [K, 3] of their classes, the first on top."""
    made = np.array(image, np.float32)
    for mask, label in reversed(list(zip(masks.numpy(), labels.tolist(), strict=True))):
        made[mask] = 0.5 * made[mask] + 0.5 * colours[label] / 255
    return made
