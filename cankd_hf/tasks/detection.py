"""Object detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import (
    AutoModelForObjectDetection,
    BaseImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    PreTrainedModel,
    RTDetrImageProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES

from cankd_hf.data.collate import detection_collate, original_objects, original_sizes, without_crowds
from cankd_hf.data.detection import load_detection
from cankd_hf.data.sources import ROLES, DataConfig
from cankd_hf.errors import InputError
from cankd_hf.metrics.detection import MAX_DETECTIONS, detection_scores, detection_statistics
from cankd_hf.models import register
from cankd_hf.models.student_config import StudentConfig
from cankd_hf.models.students import build_student
from cankd_hf.tasks.base import Task, TaskData

if TYPE_CHECKING:
    from cankd_hf.distiller import Distiller

# Model types whose last class is "no object", under a softmax; all others, ours too, rate each class by a sigmoid.
SOFTMAX = {"detr", "table-transformer", "yolos"}


class DetectionTask(Task):
    """Objects are found as boxes with a class; scored by COCO average precision of the whole data set.

    Args:
        id2label: name of every class.
        model_type: of the student, which decides how its outputs are read by the image processor saved beside it.
    """

    name = "detection"
    metric = "ap"
    pipeline_tag = "object-detection"

    def __init__(self, id2label: dict[int, str], model_type: str = "cankd_fpn") -> None:
        self.id2label = dict(id2label)
        self.model_type = model_type

    @classmethod
    def accepts(cls, model: PreTrainedModel) -> bool:
        name = type(model).__name__
        # Zero-shot detectors need a text with each image.
        return name.endswith("ForObjectDetection") and (
            name not in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES.values()
        )

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> DetectionTask:
        return cls(model.config.id2label, model.config.model_type)

    @classmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[DetectionTask, TaskData]:
        if not labelled:
            raise InputError(
                "distill.task_weight: with 0 nothing trains the detection head; set task: features to distil a "
                "backbone without labels, or a task_weight above 0"
            )
        data = load_detection(config, splits=splits)
        return cls(data.id2label), TaskData(data.train, data.eval, data.test, data.facts)

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        model = build_student(config, AutoModelForObjectDetection, self.id2label, ignore_index=None)
        self.model_type = model.config.model_type
        return model

    @classmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        register()
        try:
            return AutoModelForObjectDetection.from_pretrained(
                folder, revision=revision or "main", dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: expected a saved detection student, found none: {error}") from error

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        stats = {"image_mean": list(config.image_mean), "image_std": list(config.image_std), "do_normalize": True}
        size = config.image_size
        if size is not None and config.keep_aspect:
            scaled = {"do_resize": True, "size": {"shortest_edge": min(size), "longest_edge": max(size)}}
        elif size is not None:
            scaled = {"do_resize": True, "size": {"height": size[0], "width": size[1]}}
        else:
            scaled = {"do_resize": False}
        if self.model_type in SOFTMAX:
            return DetrImageProcessor(**scaled, **stats)
        # Only the first pads a batch, and tells the model where.
        fixed = size is not None and not config.keep_aspect
        return (RTDetrImageProcessor if fixed else DeformableDetrImageProcessor)(**scaled, **stats)

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return detection_collate(list(samples))

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**inputs, "labels": without_crowds(inputs["labels"])}

    def statistics(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], distiller: Distiller) -> Tensor:
        labels = inputs["labels"]
        sizes = original_sizes(labels, *inputs["pixel_values"].shape[-2:])
        found = detections(outputs["outputs"], sizes, distiller.student.config.model_type)
        return detection_statistics(found, [original_objects(*pair) for pair in zip(labels, sizes, strict=True)])

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return detection_scores(statistics, self.id2label)

    def picture(self, data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig) -> bool:
        from cankd_hf.tasks.detection_pictures import draw_detections

        draw_detections(self, data, models, file, config.image_mean, config.image_std)
        return True


def detections(outputs: Any, sizes: Tensor, model_type: str, limit: int = MAX_DETECTIONS) -> list[dict[str, Tensor]]:
    """What a detector found, for every family alike: the best pairs of a box and a class.

    Args:
        outputs: `logits` [B, N, K] (one more for the families in `SOFTMAX`) and `pred_boxes` [B, N, 4] as centre x,
            centre y, width, height, in 0..1 of the batch's images.
        sizes: [B, 2], height and width that the shares are taken of.
        model_type: of the detector's config.
        limit: how many an image can have.

    Returns:
        For each image, best first: `scores` [n] above 0, `labels` [n] in 0..K-1, `boxes` [n, 4] as x0, y0, x1, y1.
    """
    logits = outputs["logits"].float()
    rated = logits.softmax(dim=-1)[..., :-1] if model_type in SOFTMAX else logits.sigmoid()
    scores, places = rated.flatten(1).topk(min(limit, rated[0].numel()))
    labels, rows = places % rated.shape[-1], places // rated.shape[-1]
    boxes = box_convert(outputs["pred_boxes"].float(), "cxcywh", "xyxy")
    boxes = boxes * sizes.to(boxes).flip(1).repeat(1, 2)[:, None]
    return [
        {"scores": s[s > 0], "labels": y[s > 0], "boxes": b[r[s > 0]]}
        for s, y, r, b in zip(scores, labels, rows, boxes, strict=True)
    ]
