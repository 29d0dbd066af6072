"""Object detection."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    BaseImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RTDetrImageProcessor,
)

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.sources import ROLES
from cankd_hf.data.detection.collate import detection_collate, original_objects, original_sizes, without_crowds
from cankd_hf.data.detection.load import load_detection
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import InputRule, input_rule
from cankd_hf.metrics.detection import MAX_DETECTIONS, detection_scores, detection_statistics
from cankd_hf.models import register
from cankd_hf.models.backbones import first_line, load_config
from cankd_hf.models.box_count import count_boxes_once
from cankd_hf.models.prompts import (
    PROMPTED,
    give_prompt,
    load_tokenizer,
    phrase_probabilities,
    reads_text,
    text_input,
)
from cankd_hf.models.students import build_student
from cankd_hf.tasks.base import Task, TaskData

logger = logging.getLogger(__name__)

# Model types whose last class is "no object", under a softmax; all others, ours too, rate each class by a sigmoid
# (those that read a text: each word of each class).
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
        self.rule = InputRule()
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def accepts(cls, model: PreTrainedModel) -> bool:
        if not type(model).__name__.endswith("ForObjectDetection"):
            return False
        # One that reads a text is a detector of fixed classes where these have names.
        return not reads_text(model) or (model.config.model_type in PROMPTED and _has_names(model.config.id2label))

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> DetectionTask:
        return cls(model.config.id2label)._serve(model, model.name_or_path)

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
        hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        source = config.config if config.model is None else load_config(config.model, hub).to_dict()
        auto_class = _auto_class((source or {}).get("model_type"))
        model = build_student(config, auto_class, self.id2label, ignore_index=None)
        self._serve(model, config.tokenizer or config.model, config.revision)
        return model

    def load(self, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        register()
        auto_class = _auto_class(load_config(str(folder), {"revision": revision or "main"}).model_type)
        try:
            model = auto_class.from_pretrained(folder, revision=revision or "main", dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{folder}: expected a saved detection student, found none: {first_line(error)}"
            ) from error
        self._serve(model, str(folder), revision)
        return model

    def _serve(self, model: PreTrainedModel, tokenizer: str | None, revision: str | None = None) -> DetectionTask:
        """Takes note of what this model needs of its batches, its image processor and its text."""
        count_boxes_once()
        self.model_type = model.config.model_type
        self.rule = input_rule(model)
        self.pipeline_tag = "object-detection"
        self.tokenizer = None
        if self.model_type in PROMPTED:
            self.pipeline_tag = "zero-shot-object-detection"
            if text_input(model) is None:
                if not tokenizer:
                    raise InputError(
                        f"student: {self.model_type} reads its class names with a tokenizer, and nothing says which; "
                        "name a folder or Hub id that holds it as student.tokenizer"
                    )
                names = [self.id2label[index] for index in sorted(self.id2label)]
                give_prompt(model, load_tokenizer(tokenizer, revision), names)
            given = text_input(model)
            self.tokenizer = None if given is None else given.tokenizer
        return self

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        stats = {"image_mean": list(config.image_mean), "image_std": list(config.image_std), "do_normalize": True}
        size = config.image_size
        if self.rule.strict:
            height, width = self.rule.size((size[0], size[1]) if size is not None else (640, 640))
            if size is None or config.keep_aspect or list(size) != [height, width]:
                logger.warning(
                    "%s takes images whose sides are multiples of %d: batches are padded to them, but the image "
                    "processor saved beside the student stretches images to %d x %d; data.image_size: [%d, %d] "
                    "without data.keep_aspect treats all alike",
                    *(self.model_type, self.rule.multiple, height, width, height, width),
                )
            return RTDetrImageProcessor(size={"height": height, "width": width}, do_resize=True, **stats)
        if size is not None and config.keep_aspect:
            scaled = {"do_resize": True, "size": {"shortest_edge": min(size), "longest_edge": max(size)}}
        elif size is not None:
            scaled = {"do_resize": True, "size": {"height": size[0], "width": size[1]}}
        else:
            scaled = {"do_resize": False}
        if self.tokenizer is not None:
            return ProcessorOfTwo(self.tokenizer, **scaled, **stats)
        if self.model_type in SOFTMAX:
            return DetrImageProcessor(**scaled, **stats)
        # Only the first pads a batch, and tells the model where.
        fixed = size is not None and not config.keep_aspect
        return (RTDetrImageProcessor if fixed else DeformableDetrImageProcessor)(**scaled, **stats)

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return detection_collate(list(samples), self.rule.multiple if self.rule.strict else 1)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**inputs, "labels": without_crowds(inputs["labels"])}

    def statistics(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel) -> Tensor:
        labels = inputs["labels"]
        sizes = original_sizes(labels, *inputs["pixel_values"].shape[-2:])
        found = detections(outputs["outputs"], sizes, student.config.model_type)
        return detection_statistics(found, [original_objects(*pair) for pair in zip(labels, sizes, strict=True)])

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return detection_scores(statistics, self.id2label)

    def picture(self, data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig) -> bool:
        from cankd_hf.tasks.detection_pictures import draw_detections

        draw_detections(self, data, models, file, config.image_mean, config.image_std)
        return True


class ProcessorOfTwo(GroundingDinoImageProcessor):
    """An image processor that is saved together with a tokenizer, as the one processor that Grounding DINO has.

    Args:
        tokenizer: the model's.
        settings: of the image processor.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(**settings)
        self._settings, self._tokenizer = settings, tokenizer

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> Any:
        images = GroundingDinoImageProcessor(**self._settings)
        return GroundingDinoProcessor(images, self._tokenizer).save_pretrained(save_directory, push_to_hub, **kwargs)


def _auto_class(model_type: str | None) -> Any:
    return AutoModelForZeroShotObjectDetection if model_type in PROMPTED else AutoModelForObjectDetection


def _has_names(id2label: Mapping[int, str]) -> bool:
    return any(name != f"LABEL_{index}" for index, name in id2label.items())


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
