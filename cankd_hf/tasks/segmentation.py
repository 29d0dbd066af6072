"""Semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSemanticSegmentation, BaseImageProcessor, PreTrainedModel, SegformerImageProcessor

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.batch import takes_bytes
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.opening import SplitCatalog, open_set
from cankd_hf.data.common.sources import ROLES, TaskData
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.expected import mask_problem
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.data.segmentation.transforms import EvalTransform
from cankd_hf.metrics.segmentation import confusion_counts, image_ious, segmentation_areas, segmentation_scores
from cankd_hf.models.students import build_student, load_student
from cankd_hf.tasks.base import Metric, PipelineTask, class_labels, class_names, listed, stretched
from cankd_hf.tasks.export_forms import ExportForm, PixelsForm
from cankd_hf.tasks.overview import MaskOverview
from cankd_hf.tasks.pictures import class_colours
from cankd_hf.tasks.segmentation_labels import MaskLabelling
from cankd_hf.tasks.showing import Confusion, ImageScores
from cankd_hf.tasks.starting import MASKS


class SegmentationTask(PipelineTask):
    """Gives every pixel a class; scored by mean intersection over union of the whole data set.

    Args:
        id2label: name of every class.
        ignore_index: label of pixels that are ignored.
        palette: colour of every class for pictures, RGB in 0..255.
    """

    name = "segmentation"
    metric = "miou"
    metrics = {
        "miou": Metric("mean_iou", "Mean IoU", "mIoU"),
        "pixel_accuracy": Metric("accuracy", "Pixel accuracy"),
        "mean_accuracy": Metric("mean_accuracy", "Mean class accuracy"),
    }
    further_scores = ("iou_",)
    pipeline_tag = "image-segmentation"
    label_kind, overview, starter = "masks", MaskOverview, MASKS
    takes_labels = True
    prints = 'found["mask"].size'
    pictured = True

    def __init__(
        self, id2label: dict[int, str], ignore_index: int = 255, palette: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self.id2label = dict(id2label)
        self.ignore_index = ignore_index
        self.palette = palette

    @classmethod
    def recognises(cls, architecture: str) -> bool:
        return "SemanticSegmentation" in architecture

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> SegmentationTask:
        return cls(class_labels(model), getattr(model.config, "semantic_loss_ignore_index", 255))

    @classmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[SegmentationTask, TaskData]:
        cls.check_labelled(labelled)
        data = load_segmentation(config, splits=splits)
        return cls(data.id2label, data.ignore_index, data.palette), data

    @classmethod
    def open_data(cls, config: DataConfig) -> SplitCatalog:
        return open_set(config, need_masks=True)

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        return build_student(config, AutoModelForSemanticSegmentation, self.id2label, self.ignore_index)

    @classmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        return load_student(AutoModelForSemanticSegmentation, folder, revision, cls.name)

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        return SegformerImageProcessor(**stretched(config), do_reduce_labels=False)

    @classmethod
    def eval_transform(cls, config: DataConfig) -> Transform:
        return EvalTransform(config)

    @classmethod
    def labelling(cls) -> type[MaskLabelling]:
        return MaskLabelling

    @takes_bytes
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return segmentation_collate(list(samples), self.ignore_index)

    def counted_labels(self, labels: Any) -> tuple[Any, Tensor | None]:
        """If all pixels [B, H, W] are void, one of class 0 stands in, so that the mean is finite, and counts 0."""
        if not isinstance(labels, Tensor):  # of a user's collator, for a student that takes a list
            return labels, None
        counts = (labels != self.ignore_index).any()
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and counts:  # nobody waits for the answer
            return labels, counts.float()
        labels = labels.clone(memory_format=torch.contiguous_format)
        first = labels.view(-1)[:1]
        first.copy_(torch.where(counts, first, torch.zeros_like(first)))
        return labels, counts.float()

    def label_problem(self, labels: Any, size: tuple[int, int], scored: bool) -> str | None:
        return mask_problem(labels, size, len(self.id2label), self.ignore_index, scored)

    def model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        kept = dict(inputs)
        sizes = kept.pop("label_sizes", None)
        # Masks of several sizes, padded to one, do not match their images: they can be scored, but give no loss.
        if sizes is not None and any(size != list(kept["labels"].shape[-2:]) for size in sizes.tolist()):
            kept.pop("labels")
        return kept

    def statistics(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel) -> Tensor:
        return segmentation_areas(
            outputs["logits"], inputs["labels"], len(self.id2label), self.ignore_index, inputs.get("label_sizes")
        )

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return segmentation_scores(statistics, self.id2label)

    def image_scores(self, statistics: np.ndarray) -> ImageScores:
        return ImageScores("mIoU of the image", image_ious(statistics))

    def tally(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor:
        sizes = inputs.get("label_sizes")
        return confusion_counts(outputs["logits"], inputs["labels"], len(self.id2label), self.ignore_index, sizes)

    def confusion(self, statistics: np.ndarray, tally: np.ndarray | None) -> Confusion | None:
        return (
            None
            if tally is None
            else Confusion([self.id2label[key] for key in sorted(self.id2label)], tally, "pixels")
        )

    @torch.no_grad()
    def answer(self, model: PreTrainedModel, pixel_values: Tensor, **settings: Any) -> np.ndarray:
        """The class of every pixel, [H, W]."""
        logits = model(pixel_values=pixel_values[None].to(model.device, model.dtype)).logits.float()
        size = pixel_values.shape[-2:]
        logits = functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
        return logits[0].argmax(dim=0).cpu().numpy()

    def truth(self, sample: Mapping[str, Any]) -> np.ndarray:
        return np.asarray(sample["labels"])

    def paint(self, image: np.ndarray, answer: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Classes in their colours, black where there is no label."""
        colours = class_colours(len(self.id2label), self.palette)
        rows, columns = (np.arange(own) * there // own for own, there in zip(answer.shape, truth.shape, strict=True))
        void = truth[rows[:, None], columns] == self.ignore_index
        painted: np.ndarray = np.where(void[..., None], np.uint8(0), colours[np.clip(answer, 0, len(colours) - 1)])
        return painted

    def legend(self) -> list[tuple[str, Any]]:
        colours = class_colours(len(self.id2label), self.palette)
        return [
            *((self.id2label[key], colours[key] / 255) for key in sorted(self.id2label)[:24]),
            ("no label in the ground truth", "k"),
        ]

    @classmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        classes = len(class_names(config))
        which = f" one of {classes} classes" if classes else " a class"
        return f"A segmentation model{size} that gives every pixel of an image{which}, {source}."

    @classmethod
    def limits(cls, config: Mapping[str, Any]) -> list[str]:
        names = class_names(config)
        return [f"It knows {len(names)} classes and gives every pixel one of them: {listed(names)}."] if names else []

    @classmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        return PixelsForm(
            model, {"logits": "[B, K, h, w] float32, classes by pixel; resize to the image, then argmax"}
        )
