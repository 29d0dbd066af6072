"""Instance segmentation: objects with a class, a box and a mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoModelForInstanceSegmentation, PreTrainedModel

from cankd_hf.data.common.transforms import resize_labels
from cankd_hf.data.detection.collate import original_objects, original_sizes
from cankd_hf.data.detection.expected import objects_problem
from cankd_hf.metrics.detection import detection_scores
from cankd_hf.metrics.masks import BOXES, MASKS, instance_statistics, segmentations
from cankd_hf.models.fpn.modeling_cankd_fpn_instances import FPNForInstanceSegmentation
from cankd_hf.models.plain_detectors import FORMS, MaskForm
from cankd_hf.tasks.base import Metric, class_names, trusted
from cankd_hf.tasks.detection import DETECTIONS, DetectionTask
from cankd_hf.tasks.detection_outputs import THRESHOLD, detections_of
from cankd_hf.tasks.export_forms import ExportForm, InstancesForm
from cankd_hf.tasks.instance_labels import InstanceLabelling
from cankd_hf.tasks.instance_outputs import instances, instances_in, tinted
from cankd_hf.tasks.overview import InstanceOverview
from cankd_hf.tasks.pictures import class_colours
from cankd_hf.tasks.showing import Confusion, ImageScores
from cankd_hf.tasks.starting import INSTANCES

MASK_LOGITS = "[B, N, 28, 28] float32, logits of each mask within its box: resize to the box, then above 0"


class InstanceSegmentationTask(DetectionTask):
    """Finds objects with a class, a box and a mask; scored by COCO average precision of masks, and of boxes.

    Args:
        id2label: name of every class.
        model_type: of the student, which decides the image processor saved beside it; set by `for_model`.
    """

    name = "instance-segmentation"
    masked = True
    metric = "mask_ap"
    metrics = {
        "mask_ap": Metric("mask_map", "Mask AP", "mask AP"),
        "mask_ap50": Metric("mask_map_50", "Mask AP50"),
        "mask_ap75": Metric("mask_map_75", "Mask AP75"),
        "ap": Metric("map", "Box AP"),
        "ap50": Metric("map_50", "Box AP50"),
    }
    further_scores = ("mask_ap_", "mask_ar", "ap_", "ap75", "ar")
    pipeline_tag = "image-segmentation"
    label_kind, overview, starter = "instances", InstanceOverview, INSTANCES
    picture_note = f"masks with a score of at least {THRESHOLD:g}"

    @classmethod
    def recognises(cls, architecture: str) -> bool:
        return architecture.endswith("ForInstanceSegmentation")

    @classmethod
    def auto_class(cls, model_type: str | None) -> Any:
        return AutoModelForInstanceSegmentation

    @classmethod
    def pipeline_tag_of(cls, config: Mapping[str, Any]) -> str:
        return cls.pipeline_tag

    @classmethod
    def labelling(cls) -> type[InstanceLabelling]:
        return InstanceLabelling

    def label_problem(self, labels: Any, size: tuple[int, int], scored: bool) -> str | None:
        return objects_problem(labels, len(self.id2label), scored, size)

    def statistics(  # type: ignore[override]
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel
    ) -> dict[str, Tensor]:
        labels = inputs["labels"]
        canvases = original_sizes(labels, *inputs["pixel_values"].shape[-2:])
        sizes = [tuple(label["orig_size"].tolist()) for label in labels]
        found = instances(outputs["outputs"], canvases, sizes, student.config.model_type)
        targets = [original_objects(_with_outlines(label), size) for label, size in zip(labels, canvases, strict=True)]
        return instance_statistics(found, targets)

    def scores(self, statistics: Any) -> dict[str, float]:
        masks = [segmentations(text) for text in np.asarray(statistics[MASKS])]
        return detection_scores(statistics[BOXES], self.id2label, masks)

    def image_scores(self, statistics: Any) -> ImageScores:
        return super().image_scores(statistics[BOXES])

    def confusion(self, statistics: Any, tally: np.ndarray | None) -> Confusion:
        return super().confusion(statistics[BOXES], tally)

    def answer(self, model: PreTrainedModel, pixel_values: Tensor, **settings: Any) -> dict[str, Tensor]:
        """`scores`, `labels`, `boxes` and `masks` [n, H, W] of detections from the score `threshold` on."""
        return instances_in(model, pixel_values, settings.get("threshold", THRESHOLD))

    def truth(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        return {**super().truth(sample), "masks": sample["labels"]["masks"]}

    def paint(self, image: np.ndarray, answer: dict[str, Tensor], truth: dict[str, Tensor]) -> np.ndarray:
        colours = class_colours(len(self.id2label), None)
        return super().paint(tinted(image, answer["masks"], answer["labels"], colours), answer, truth)

    @classmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        classes = len(class_names(config))
        kinds = f"{classes} kinds of things" if classes else "things"
        return f"A model{size} that finds {kinds} and outlines each of them, {source}."

    @classmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        before, trust, note = trusted(config)
        code = (
            f"{before}from PIL import Image\n"
            "from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation\n\n"
            f'folder, image = {json.dumps(name)}, Image.open("photo.jpg").convert("RGB")\n'
            f"model = AutoModelForInstanceSegmentation.from_pretrained(folder{trust})\n"
            'inputs = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")\n'
            f"found = model.post_process_instance_segmentation(model(**inputs), {THRESHOLD}, [image.size[::-1]])[0]\n"
            'print([model.config.id2label[int(label)] for label in found["labels"]], found["masks"].shape)'
        )
        return code, note

    @classmethod
    def quick_usage(cls, config: Mapping[str, Any], folder: str) -> str:
        return cls.usage(config, folder)[0]

    @classmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        assert isinstance(model, FPNForInstanceSegmentation)  # others are refused before
        plain = MaskForm(FORMS[model.config.head](model))
        return InstancesForm(model, {**DETECTIONS, "masks": MASK_LOGITS}, _with_masks, plain, ("torchvision",))


def _with_outlines(label: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Labels with masks of the data set's own size, for those that do not bring their outlines."""
    if "outlines" in label:
        return label
    (height, width), (rows, columns) = label["size"].tolist(), label["orig_size"].tolist()
    return {**label, "masks": resize_labels(label["masks"][:, :height, :width].byte(), (rows, columns))}


def _with_masks(output: Any) -> list[Tensor]:
    return [*detections_of(output), output.pred_masks]
