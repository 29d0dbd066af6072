"""Detections of every family of detectors, read from their outputs and drawn beside the ground truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import PreTrainedModel

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.collate import detection_collate, original_objects
from cankd_hf.features.dense import SOFTMAX as SOFTMAX
from cankd_hf.features.inputs import input_rule
from cankd_hf.metrics.detection import MAX_DETECTIONS
from cankd_hf.models.prompts import PROMPTED, phrase_probabilities
from cankd_hf.tasks.pictures import ROWS, class_colours, denormalize, draw_grid, sample_evenly

THRESHOLD = 0.3  # detections with a lower score are not drawn


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
    return scores, labels, boxes.gather(1, rows[..., None].expand(-1, -1, 4))


def detections_of(output: Any) -> list[Tensor]:
    """Detections of our own detectors: scores [B, N], labels [B, N], -1 after the last, boxes [B, N, 4], corners."""
    scores, labels = output.logits.sigmoid().max(dim=-1)
    return [scores, torch.where(scores > 0, labels, -1), box_convert(output.pred_boxes, "cxcywh", "xyxy")]


def draw_detections(
    id2label: Mapping[int, str], data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig
) -> None:
    """Writes a PNG with one sample a row: the image with its true boxes, then with the boxes of each model."""
    samples, titles = sample_evenly(data, ROWS), ["ground truth", *models]
    colours = class_colours(len(id2label), None) / 255
    images = [denormalize(sample["pixel_values"], config.image_mean, config.image_std) for sample in samples]
    found = [
        [
            original_objects(sample["labels"], torch.tensor(image.shape[:2])),
            *(_found(model, sample) for model in models.values()),
        ]
        for sample, image in zip(samples, images, strict=True)
    ]

    def mark(axis: Any, row: int, column: int) -> None:
        objects = found[row][column]
        labels = objects["labels"] if "labels" in objects else objects["class_labels"]
        _draw_boxes(axis, objects["boxes"].tolist(), labels.tolist(), colours)

    rows = [[image] * len(titles) for image in images]
    legend = [(id2label[label], colours[label]) for label in sorted(id2label)[:24]]
    title = f"detections with a score of at least {THRESHOLD:g}"
    draw_grid(file, titles, rows, legend, 3.2, mark, ncols=3 * len(titles), title=title, title_fontsize=9)


def _draw_boxes(axis: Any, boxes: Sequence[Sequence[float]], labels: Sequence[int], colours: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
        # A dark line under the coloured one makes it visible on any background.
        for colour, line in (("k", 2.2), (colours[label], 1.5)):
            box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=line)
            axis.add_patch(box)


@torch.no_grad()
def _found(model: PreTrainedModel, sample: Mapping[str, Any]) -> dict[str, Tensor]:
    model.eval()
    rule = input_rule(model)
    batch = detection_collate([{"pixel_values": sample["pixel_values"]}], rule.multiple if rule.strict else 1)
    padded = torch.tensor(batch["pixel_values"].shape[-2:])
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    found = detections(model(**inputs), padded[None], model.config.model_type)[0]
    return {key: value[found["scores"] >= THRESHOLD].cpu() for key, value in found.items()}
