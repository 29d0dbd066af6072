"""Object detection."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    BaseImageProcessor,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RTDetrImageProcessor,
)
from transformers.image_utils import PILImageResampling
from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.batch import takes_bytes
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.opening import SplitCatalog
from cankd_hf.data.common.sources import ROLES, TaskData
from cankd_hf.data.detection.collate import detection_collate, original_objects, original_sizes, without_crowds
from cankd_hf.data.detection.expected import objects_problem
from cankd_hf.data.detection.load import load_detection, open_objects
from cankd_hf.data.detection.mixing import mixed_labels
from cankd_hf.data.detection.transforms import DetectionEvalTransform
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import InputRule, input_rule
from cankd_hf.metrics.boxes import match_boxes
from cankd_hf.metrics.detection import detection_scores, detection_tables
from cankd_hf.models import prompts, register
from cankd_hf.models.backbones import load_config
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.models.native_masks import prepare
from cankd_hf.models.plain_detectors import FORMS, DenseForm
from cankd_hf.models.prompts import PROMPTED
from cankd_hf.models.students import build_student, load_student
from cankd_hf.tasks.base import Metric, PipelineTask, class_labels, class_names, listed
from cankd_hf.tasks.detection_labels import BoxLabelling
from cankd_hf.tasks.detection_outputs import SOFTMAX, THRESHOLD, best_pairs, detections_of, draw_boxes, found_in
from cankd_hf.tasks.detection_outputs import detections as detections  # named here by those who score by hand
from cankd_hf.tasks.export_forms import DetectionsForm, ExportForm, QueriesForm
from cankd_hf.tasks.overview import BoxOverview
from cankd_hf.tasks.pictures import class_colours
from cankd_hf.tasks.showing import Confusion, ImageScores
from cankd_hf.tasks.starting import BOXES

logger = logging.getLogger(__name__)

# Outputs of an exported file and their conventions: of our own detectors, and of those with one row per query.
DETECTIONS = {
    "scores": "[B, N] float32, best first, 0 after the last detection",
    "labels": "[B, N] int64, -1 after the last detection",
    "boxes": "[B, N, 4] float32, left, top, right, bottom in 0..1 of the width and height of pixel_values",
}
QUERIES = {
    "logits": "[B, N, K] float32, as the image processor of transformers reads them",
    "pred_boxes": "[B, N, 4] float32, centre x, centre y, width, height in 0..1 of the input",
}


class DetectionTask(PipelineTask):
    """Finds objects as boxes with a class; scored by COCO average precision of the whole data set.

    Args:
        id2label: name of every class.
        model_type: of the student, which decides the image processor saved beside it; set by `for_model`.
    """

    name = "detection"
    masked: ClassVar[bool] = False  # whether the objects of its data sets have masks
    metric = "ap"
    metrics = {"ap": Metric("map", "AP", "AP"), "ap50": Metric("map_50", "AP50"), "ap75": Metric("map_75", "AP75")}
    further_scores: ClassVar[tuple[str, ...]] = ("ap_", "ar")
    pipeline_tag = "object-detection"
    label_kind, overview, starter = "boxes", BoxOverview, BOXES
    takes_labels = True
    prints = 'found["score"], found["box"]'
    ragged_labels = True
    pictured = True
    picture_note = f"boxes with a score of at least {THRESHOLD:g}"

    def __init__(self, id2label: dict[int, str], model_type: str = "cankd_fpn") -> None:
        self.id2label = dict(id2label)
        self.model_type = model_type
        self.rule = InputRule()
        self.tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def recognises(cls, architecture: str) -> bool:
        return architecture.endswith("ForObjectDetection")

    @classmethod
    def accepts(cls, model: PreTrainedModel) -> bool:
        if not super().accepts(model):
            return False
        # A model with a text prompt is a detector of fixed classes if these have names.
        named = any(name != f"LABEL_{index}" for index, name in class_labels(model).items())
        return not prompts.reads_text(model) or (model.config.model_type in PROMPTED and named)

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> DetectionTask:
        return cls(class_labels(model)).for_model(_prepared(model, model.name_or_path))

    def for_model(self, model: PreTrainedModel) -> DetectionTask:
        prepare(model)
        task = copy.copy(self)
        task.model_type = model.config.model_type
        task.pipeline_tag = self.pipeline_tag_of({"model_type": task.model_type})
        task.rule = input_rule(model)
        given = prompts.text_input(model) if task.model_type in PROMPTED else None
        task.tokenizer = None if given is None else given.tokenizer
        return task

    @classmethod
    def images(cls, config: DataConfig) -> TaskData:
        return load_detection(config, need_labels=False, splits=("train",))

    @classmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[DetectionTask, TaskData]:
        cls.check_labelled(labelled)
        data = load_detection(config, splits=splits, masked=cls.masked)
        return cls(data.id2label), data

    @classmethod
    def open_data(cls, config: DataConfig) -> SplitCatalog:
        return open_objects(config, ROLES, cls.masked)

    @classmethod
    def auto_class(cls, model_type: str | None) -> Any:
        """The auto class of transformers that knows models of this type."""
        return AutoModelForZeroShotObjectDetection if model_type in PROMPTED else AutoModelForObjectDetection

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        source = config.config if config.model is None else load_config(config.model, hub).to_dict()
        auto_class = self.auto_class((source or {}).get("model_type"))
        model = build_student(config, auto_class, self.id2label, ignore_index=None)
        return _prepared(model, config.tokenizer or config.model, config.revision)

    @classmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        register()
        auto_class = cls.auto_class(load_config(str(folder), {"revision": revision or "main"}).model_type)
        return _prepared(load_student(auto_class, folder, revision, cls.name), str(folder), revision)

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        stats: dict[str, Any] = {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
        stats |= {"do_normalize": True, "resample": PILImageResampling.BILINEAR}
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
            return self.own_processor({"size": {"height": height, "width": width}, "do_resize": True, **stats}, True)
        settings: dict[str, Any] = {**stats, "do_resize": size is not None}
        if size is not None and config.keep_aspect:
            settings["size"] = {"shortest_edge": min(size), "longest_edge": max(size)}
        elif size is not None:
            settings["size"] = {"height": size[0], "width": size[1]}
        return self.own_processor(settings, size is not None and not config.keep_aspect)

    def own_processor(self, settings: Mapping[str, Any], stretches: bool) -> BaseImageProcessor:
        """The student's kind of image processor; `stretches`: to one size, whatever the aspect ratio."""
        if self.tokenizer is not None:
            return prompts.ImageTextProcessor(self.tokenizer, **settings)
        if self.model_type in SOFTMAX:
            return DetrImageProcessor(**settings)
        # DeformableDetr's pads a batch and returns a mask of the padding.
        return (RTDetrImageProcessor if stretches else DeformableDetrImageProcessor)(**settings)

    @classmethod
    def eval_transform(cls, config: DataConfig) -> Transform:
        return DetectionEvalTransform(config)

    @classmethod
    def labelling(cls) -> type[BoxLabelling]:
        return BoxLabelling

    @takes_bytes
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = detection_collate(list(samples), self.rule.pads_to)
        size, fixed = tuple(batch["pixel_values"].shape[-2:]), self.rule.fixed
        if fixed is not None and size != fixed:
            raise InputError(
                f"data.image_size: {self.model_type} takes images of {fixed[0]} x {fixed[1]} alone, got some of "
                f"{size[0]} x {size[1]} with their padding; set it to [{fixed[0]}, {fixed[1]}], and crop_size too if "
                "there is one"
            )
        return batch

    def mix_labels(self, labels: Any, seen: Tensor, plan: Sequence[Sequence[int]]) -> Any:
        return mixed_labels(labels, plan, (seen.shape[-2], seen.shape[-1]))

    def label_problem(self, labels: Any, size: tuple[int, int], scored: bool) -> str | None:
        return objects_problem(labels, len(self.id2label), scored)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        labels = inputs.get("labels")
        return dict(inputs) if labels is None else {**inputs, "labels": without_crowds(labels)}

    def statistics(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel) -> Tensor:
        labels = inputs["labels"]
        sizes = original_sizes(labels, *inputs["pixel_values"].shape[-2:])
        scores, classes, boxes = best_pairs(outputs["outputs"], sizes, student.config.model_type)
        rated = scores.where(scores > 0, torch.nan)  # a score of 0 is no detection
        found = torch.cat([classes[..., None].float(), rated[..., None], boxes], 2)
        return detection_tables(found, [original_objects(*pair) for pair in zip(labels, sizes, strict=True)])

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return detection_scores(statistics, self.id2label)

    def image_scores(self, statistics: np.ndarray) -> ImageScores:
        found = match_boxes(statistics, len(self.id2label))
        name = f"F1 of the image at IoU 0.5, scores from {found.threshold:.2f}"
        return ImageScores(name, found.f1, settings={"threshold": found.threshold})

    def confusion(self, statistics: np.ndarray, tally: np.ndarray | None) -> Confusion:
        found = match_boxes(statistics, len(self.id2label))
        note = (
            f"Boxes match from an IoU of 0.5 on, first those of one class. Detections with a score of at least "
            f"{found.threshold:.2f} count: there the F1 score of this set is best."
        )
        names = [self.id2label[key] for key in sorted(self.id2label)]
        return Confusion([*names, "background"], found.confusion, "boxes", note)

    def answer(self, model: PreTrainedModel, pixel_values: Tensor, **settings: Any) -> dict[str, Tensor]:
        """`scores`, `labels` and `boxes` (corners, in pixels) of detections from the score `threshold` on."""
        return found_in(model, pixel_values, settings.get("threshold", THRESHOLD))

    def truth(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        objects = original_objects(sample["labels"], torch.tensor(sample["pixel_values"].shape[-2:]))
        return {"labels": objects["class_labels"], "boxes": objects["boxes"]}

    def paint(self, image: np.ndarray, answer: dict[str, Tensor], truth: dict[str, Tensor]) -> np.ndarray:
        return draw_boxes(image, answer["boxes"], answer["labels"], class_colours(len(self.id2label), None))

    def legend(self) -> list[tuple[str, Any]]:
        colours = class_colours(len(self.id2label), None) / 255
        return [(self.id2label[key], colours[key]) for key in sorted(self.id2label)[:24]]

    @classmethod
    def pipeline_tag_of(cls, config: Mapping[str, Any]) -> str:
        return f"zero-shot-{cls.pipeline_tag}" if config.get("model_type") in PROMPTED else cls.pipeline_tag

    @classmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        classes = len(class_names(config))
        kinds = f"{classes} kinds of things" if classes else "things"
        return f"An object detector{size} that finds and boxes {kinds}, {source}."

    @classmethod
    def call_arguments(cls, config: Mapping[str, Any]) -> str:
        # A zero-shot pipeline needs the classes that the student was trained on.
        return f", candidate_labels={class_names(config)}" if config.get("model_type") in PROMPTED else ""

    @classmethod
    def limits(cls, config: Mapping[str, Any]) -> list[str]:
        names = class_names(config)
        if not names:
            return []
        said = [f"It finds {len(names)} classes and nothing else: {listed(names)}."]
        if "nms_threshold" in config:
            score, overlap = config["score_threshold"], config["nms_threshold"]
            said.append(
                f"Detections below a score of {score:g} are dropped, and so is the weaker of two boxes of a class "
                f"that overlap by more than {overlap:g}."
            )
        return said

    @classmethod
    def why_not_exported(cls, config: Mapping[str, Any]) -> str | None:
        if config.get("model_type") not in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES:
            return None
        return "it reads a text with each image, which this export cannot give it"

    @classmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        if isinstance(model, FPNForObjectDetection):
            made = FORMS.get(model.config.head, DenseForm)
            return DetectionsForm(model, DETECTIONS, detections_of, made(model), ("torchvision",))
        return QueriesForm(model, QUERIES, imports=("torchvision",))


def draw_detections(
    id2label: Mapping[int, str], data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig
) -> None:
    """`DetectionTask.picture` of detectors without a task."""
    DetectionTask(dict(id2label)).picture(data, models, file, config)


def _prepared(model: PreTrainedModel, tokenizer: str | None, revision: str | None = None) -> PreTrainedModel:
    """A detector that needs only images: one with a text prompt gets its class names as the prompt."""
    prepare(model)
    if model.config.model_type not in PROMPTED or prompts.text_input(model) is not None:
        return model
    if not tokenizer:
        raise InputError(
            f"student: {model.config.model_type} reads its class names with a tokenizer, and nothing says which; "
            "name a folder or Hub id that holds it as student.tokenizer"
        )
    names = [name for _, name in sorted(class_labels(model).items())]
    prompts.attach_prompt(model, prompts.load_tokenizer(tokenizer, revision), names)
    return model
