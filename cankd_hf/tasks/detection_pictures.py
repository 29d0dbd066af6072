"""Pictures of detections beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cankd_hf.data.detection.collate import detection_collate, original_objects
from cankd_hf.features.inputs import input_rule
from cankd_hf.tasks.detection_outputs import detections
from cankd_hf.tasks.pictures import ROWS, class_colours, denormalize, draw_grid, sample_evenly


def draw_detections(
    id2label: Mapping[int, str],
    data: Any,
    models: Mapping[str, PreTrainedModel],
    file: Path,
    mean: Sequence[float],
    std: Sequence[float],
    threshold: float = 0.3,
) -> None:
    """Writes a grid: the image with its true boxes, then with each model's, one sample a row, classes named below.

    Args:
        id2label: names of the classes.
        data: data set of `pixel_values` [3, H, W] and `labels` of detection.
        models: the models by the name to write above their column, all taking the same normalisation.
        file: the PNG to write.
        mean: of the normalisation to undo, per channel.
        std: the same.
        threshold: detections with a lower score are not drawn.
    """
    samples, titles = sample_evenly(data, ROWS), ["ground truth", *models]
    colours = class_colours(len(id2label), None) / 255
    images = [denormalize(sample["pixel_values"], mean, std) for sample in samples]
    found = [
        [
            original_objects(sample["labels"], torch.tensor(image.shape[:2])),
            *(_found(model, sample, threshold) for model in models.values()),
        ]
        for sample, image in zip(samples, images, strict=True)
    ]

    def mark(axis: Any, row: int, column: int) -> None:
        objects = found[row][column]
        labels = objects["labels"] if "labels" in objects else objects["class_labels"]
        _draw_boxes(axis, objects["boxes"].tolist(), labels.tolist(), colours)

    rows = [[image] * len(titles) for image in images]
    legend = [(id2label[label], colours[label]) for label in sorted(id2label)[:24]]
    title = f"detections with a score of at least {threshold:g}"
    draw_grid(file, titles, rows, legend, 3.2, mark, ncols=3 * len(titles), title=title, title_fontsize=9)


def _draw_boxes(axis: Any, boxes: Sequence[Sequence[float]], labels: Sequence[int], colours: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
        # A dark line under the coloured one keeps it apart from any ground.
        for colour, line in (("k", 2.2), (colours[label], 1.5)):
            box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=line)
            axis.add_patch(box)


@torch.no_grad()
def _found(model: PreTrainedModel, sample: Mapping[str, Any], threshold: float) -> dict[str, Tensor]:
    model.eval()
    rule = input_rule(model)
    batch = detection_collate([{"pixel_values": sample["pixel_values"]}], rule.multiple if rule.strict else 1)
    padded = torch.tensor(batch["pixel_values"].shape[-2:])
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    found = detections(model(**inputs), padded[None], model.config.model_type)[0]
    return {key: value[found["scores"] >= threshold].cpu() for key, value in found.items()}
