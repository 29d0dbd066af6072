"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel, ViTImageProcessor

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.classification.load import load_classification, open_classes
from cankd_hf.data.classification.transforms import ClassEvalTransform, classification_collate
from cankd_hf.data.common.batch import takes_bytes
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.opening import SplitCatalog
from cankd_hf.data.common.sources import ROLES, TaskData
from cankd_hf.data.common.targets import NO_CLASS
from cankd_hf.metrics.classification import class_rows, class_scores, confusion_of, probabilities
from cankd_hf.models.students import build_student, load_student
from cankd_hf.tasks.base import Metric, PipelineTask, class_labels, class_names, listed, stretched
from cankd_hf.tasks.export_forms import ExportForm, PixelsForm
from cankd_hf.tasks.overview import ClassOverview
from cankd_hf.tasks.showing import Confusion, ImageScores
from cankd_hf.tasks.starting import CLASSES

RIGHT, WRONG = (0, 158, 115), (213, 94, 0)  # colours of the frame around a picture
EDGE = 0.04  # of the picture's shorter side


class ClassesForm(PixelsForm):
    """One tensor of logits [B, K]."""

    equal_name = "equal images"


class ClassificationTask(PipelineTask):
    """Gives every image a class; scored by the share of images whose class is right.

    Args:
        id2label: name of every class.
    """

    name = "classification"
    metric = "accuracy"
    metrics = {
        "accuracy": Metric("accuracy", "Accuracy", "accuracy"),
        "top5_accuracy": Metric("top5_accuracy", "Top-5 accuracy"),
        "mean_accuracy": Metric("mean_accuracy", "Mean class accuracy"),
    }
    further_scores = ("accuracy_",)
    pipeline_tag = "image-classification"
    label_kind, overview, starter = "classes", ClassOverview, CLASSES
    takes_labels = True
    ignore_index = NO_CLASS
    prints = 'found["score"]'
    pictured = True
    picture_note: ClassVar[str] = "a green frame: the right class; an orange one: another"
    teacher_head = "AutoModelForImageClassification"

    def __init__(self, id2label: dict[int, str]) -> None:
        self.id2label = dict(id2label)

    # Models

    @classmethod
    def recognises(cls, architecture: str) -> bool:
        return architecture.endswith("ForImageClassification")

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> ClassificationTask:
        return cls(class_labels(model))

    @classmethod
    def open_data(cls, config: DataConfig) -> SplitCatalog:
        return open_classes(config)

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        return build_student(config, AutoModelForImageClassification, self.id2label, None, fewest=2)

    @classmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        return load_student(AutoModelForImageClassification, folder, revision, cls.name)

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        return ViTImageProcessor(**stretched(config))

    # Data

    @classmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[ClassificationTask, TaskData]:
        cls.check_labelled(labelled)
        data = load_classification(config, splits)
        return cls(data.id2label), data

    @classmethod
    def eval_transform(cls, config: DataConfig) -> Transform:
        return ClassEvalTransform(config)

    @takes_bytes
    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return classification_collate(list(samples))

    def mix_labels(self, labels: Any, seen: Tensor, plan: Sequence[Sequence[int]]) -> Any:
        """The classes [B] as they are: parts of pictures are erased, never pasted from others."""
        return labels

    def counted_labels(self, labels: Any) -> tuple[Any, Tensor | None]:
        """If no image of [B] has a class, class 0 stands in for the first, so that the mean is finite; it counts 0."""
        counts = (labels >= 0).any()
        first = torch.where(counts, labels[:1], torch.zeros_like(labels[:1]))
        return torch.cat([first, labels[1:]]), counts.float()

    def label_problem(self, labels: Any, size: tuple[int, int], scored: bool) -> str | None:
        classes = len(self.id2label)
        label = torch.as_tensor(labels) if isinstance(labels, (int, np.integer)) else labels
        if not isinstance(label, Tensor) or label.numel() != 1 or label.is_floating_point():
            return f"labels: expected the number of a class, got {str(labels)[:60]}; give one int for each image"
        if not 0 <= int(label) < classes and int(label) != NO_CLASS:
            return f"labels: expected a class 0..{classes - 1}, got {int(label)}; correct it or the number of classes"
        return None

    # Evaluation

    def statistics(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel) -> Tensor:
        return class_rows(outputs["logits"], inputs["labels"])

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return class_scores(statistics, self.id2label)

    def image_scores(self, statistics: Any) -> ImageScores:
        return ImageScores("probability of the right class", probabilities(statistics))

    def confusion(self, statistics: Any, tally: np.ndarray | None) -> Confusion:
        names = [self.id2label[label] for label in sorted(self.id2label)]
        return Confusion(names, confusion_of(statistics, len(names)), "images")

    # Pictures

    @torch.no_grad()
    def answer(self, model: PreTrainedModel, pixel_values: Tensor, **settings: Any) -> Any:
        logits = model(pixel_values=pixel_values[None].to(model.device, model.dtype)).logits[0]
        return logits.float().softmax(0).cpu()

    def truth(self, sample: Mapping[str, Any]) -> Any:
        label = int(sample["labels"])
        return torch.nn.functional.one_hot(torch.tensor(max(label, 0)), len(self.id2label)).float() * float(label >= 0)

    def paint(self, image: np.ndarray, answer: Any, truth: Any) -> np.ndarray:
        picture = (255 * np.asarray(image)).astype(np.uint8)
        if answer is truth or not truth.any():
            return picture
        edge = max(1, round(EDGE * min(picture.shape[:2])))
        framed = np.empty_like(picture)
        framed[:] = RIGHT if int(answer.argmax()) == int(truth.argmax()) else WRONG
        framed[edge:-edge, edge:-edge] = picture[edge:-edge, edge:-edge]
        return framed

    def caption(self, answer: Any, truth: Any) -> str:
        if not answer.any():
            return "no class"
        best = int(answer.argmax())
        return f"{self.id2label[best]}{'' if answer is truth else f' {float(answer[best]):.2f}'}"

    def legend(self) -> list[tuple[str, Any]]:
        return [("right class", np.array(RIGHT) / 255), ("another class", np.array(WRONG) / 255)]

    # The card

    @classmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        classes = len(class_names(config))
        which = f"one of {classes} classes" if classes else "a class"
        return f"An image classifier{size} that gives an image {which}, {source}."

    @classmethod
    def limits(cls, config: Mapping[str, Any]) -> list[str]:
        names = class_names(config)
        return [f"It knows {len(names)} classes and gives every image one of them: {listed(names)}."] if names else []

    # Export

    @classmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        return ClassesForm(model, {"logits": "[B, K] float32; the softmax gives probabilities"})
