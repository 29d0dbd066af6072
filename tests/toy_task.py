"""A task that the package has never heard of: how bright is the lamp? One number an image, scored by its error.

It lives here alone, is entered into `TASKS` by its test, and must go through every command as the shipped tasks do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoBackbone, BitImageProcessor, PreTrainedModel, ResNetConfig
from transformers.modeling_outputs import ImageClassifierOutput

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.decode import Sample
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.sources import ROLES, TaskData, by_role, wrap
from cankd_hf.data.common.targets import Summary
from cankd_hf.data.common.transforms import Normalize
from cankd_hf.tasks.base import Metric, Task
from cankd_hf.tasks.export_forms import ExportForm


@dataclass(frozen=True)
class Brightness:
    """The label of one image."""

    value: float

    def standing_in(self) -> Brightness:
        return Brightness(math.nan)

    def summary(self) -> Summary:
        return Summary(doubtful=self.value > 1)


class Lamps:
    """Noise around one grey level, which is the label."""

    generated = False

    def __init__(self, split: str, count: int) -> None:
        self.split, self.count = split, count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"lamps/{self.split}/{index}"

    def load(self, index: int) -> Sample:
        random = np.random.default_rng([len(self.split), index])
        level = random.uniform(0.1, 0.9)
        pixels = np.clip(255 * level + random.normal(0, 12, (3, 64, 64)), 0, 255).astype(np.uint8)
        return Sample(torch.from_numpy(pixels), Brightness(level), self.name(index))


class Catalog:
    """The generated set: three splits."""

    def __init__(self) -> None:
        self.labels = Labels()
        self.warnings: list[str] = []

    def names(self) -> list[str]:
        return ["train", "validation", "test"]

    def source(self, name: str) -> Lamps:
        return Lamps(name, 16 if name == "train" else 4)


class NormalizeLamp:
    """An image and its brightness -> the tensors of a batch."""

    def __init__(self, config: DataConfig) -> None:
        self.normalize = Normalize(config.image_mean, config.image_std)

    def __call__(self, image: Tensor, label: float | None) -> dict[str, Any]:
        item: dict[str, Any] = {"pixel_values": self.normalize(image)}
        return item if label is None else {**item, "labels": torch.tensor([label])}


class ToyRegressor(PreTrainedModel):
    """A backbone with one number on top."""

    config_class = ResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config)
        self.head = nn.Linear(self.backbone.channels[-1], 1)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        logits = self.head(self.backbone(pixel_values, **kwargs).feature_maps[-1].mean(dim=(2, 3)))
        loss = None if labels is None else nn.functional.l1_loss(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class ToyTask(Task):
    """How bright is the lamp? Scored by the mean absolute error."""

    name = "toy"
    metric = "mae"
    greater_is_better = False
    metrics = {"mae": Metric("mae", "Mean absolute error", "MAE"), "worst": Metric("max_error", "Worst error")}
    pipeline_tag = "image-classification"

    @classmethod
    def recognises(cls, architecture: str) -> bool:
        return architecture == "ToyRegressor"

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> ToyTask:
        return cls()

    @classmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[ToyTask, TaskData]:
        catalog, transform = Catalog(), cls.eval_transform(config)
        sources = by_role(config, catalog, splits)
        return cls(), wrap(config, catalog, sources, labelled, 0, transform, transform)

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        assert isinstance(config.backbone, dict)
        return ToyRegressor(ResNetConfig(**{k: v for k, v in config.backbone.items() if k != "model_type"}))

    @classmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        return ToyRegressor.from_pretrained(folder, revision=revision or "main")

    def image_processor(self, config: DataConfig) -> BitImageProcessor:
        stats = {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
        return BitImageProcessor(do_resize=False, do_center_crop=False, **stats)

    @classmethod
    def eval_transform(cls, config: DataConfig) -> NormalizeLamp:
        return NormalizeLamp(config)

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def statistics(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: Any) -> Tensor:
        return (outputs["logits"] - inputs["labels"]).abs()

    def scores(self, statistics: np.ndarray) -> dict[str, float]:
        return {"mae": float(np.nanmean(statistics)), "worst": float(np.nanmax(statistics))}

    def picture(self, data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig) -> bool:
        Image.new("L", (16, 16), int(255 * float(data[0]["labels"]))).save(file)
        return True

    @classmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        return f"A light meter{size} that tells how bright a lamp is, {source}."

    @classmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        return f'from tests.toy_task import ToyRegressor\nmodel = ToyRegressor.from_pretrained("{name}")', ""

    @classmethod
    def limits(cls, config: Mapping[str, Any]) -> list[str]:
        return ["It has never seen two lamps."]

    @classmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        return ExportForm(model, {"brightness": "[B, 1] float32"}, lambda output: [output.logits])
