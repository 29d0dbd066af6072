"""Label-free distillation: the student learns the teacher's maps from any images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BaseImageProcessor, BitImageProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.sources import ROLES
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.errors import InputError
from cankd_hf.models.backbones import load_backbone
from cankd_hf.models.students import build_student
from cankd_hf.tasks.base import Task, TaskData


class FeaturesTask(Task):
    """A backbone learns to give its teacher's maps; scored by raw similarity on held-out images.

    `correlation` is taken after the connector, `cka` between the maps as they are; neither sees a Can block.
    """

    name = "features"
    metric = "cka"
    pipeline_tag = "image-feature-extraction"
    needs_teacher_in_evaluation = True

    @classmethod
    def accepts(cls, model: PreTrainedModel) -> bool:
        return type(model).__name__ in MODEL_FOR_BACKBONE_MAPPING_NAMES.values()

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> FeaturesTask:
        return cls()

    @classmethod
    def from_data(
        cls, config: DataConfig, labelled: bool = True, splits: Sequence[str] = ROLES
    ) -> tuple[FeaturesTask, TaskData]:
        if labelled:
            raise InputError("distill.task_weight: the features task learns from the teacher alone; set it to 0")
        data = load_images(config, splits)
        return cls(), TaskData(data.train, data.eval, data.test, data.facts)

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        return build_student(config, None, {})

    def load(self, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        return load_backbone(folder, revision=revision)

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        size = config.image_size
        return BitImageProcessor(
            do_resize=size is not None,
            size={"height": size[0], "width": size[1]} if size is not None else None,
            do_center_crop=False,
            image_mean=list(config.image_mean),
            image_std=list(config.image_std),
        )

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return segmentation_collate([{"pixel_values": sample["pixel_values"]} for sample in samples])

    def statistics(
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], student: PreTrainedModel
    ) -> dict[str, Tensor]:
        return outputs["similarity"]

    def scores(self, statistics: Mapping[str, np.ndarray]) -> dict[str, float]:
        table = np.stack(list(statistics.values()), axis=1)
        means = dict(zip(statistics, table.mean(axis=0).tolist(), strict=True))
        for kind in ("correlation", "cka"):
            means[kind] = float(np.mean([value for name, value in means.items() if name.startswith(f"{kind}/")]))
        return means
