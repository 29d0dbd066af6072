"""Label-free distillation: the student learns the teacher's feature maps from any images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor, BitImageProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.batch import takes_bytes
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.sources import ROLES, TaskData
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.transforms import EvalTransform
from cankd_hf.errors import InputError
from cankd_hf.models.backbones import load_backbone
from cankd_hf.models.students import build_student
from cankd_hf.tasks.base import Metric, Task, stretched
from cankd_hf.tasks.export_forms import ExportForm
from cankd_hf.tasks.starting import BACKBONE


class FeaturesTask(Task):
    """A backbone learns the feature maps of its teacher; scored by their raw similarity on held-out images.

    `correlation` is computed after the connector, `cka` between the maps as they are; both without a Can block.
    """

    name = "features"
    metric = "cka"
    metrics = {
        "cka": Metric("cka", "Linear CKA with the teacher", "CKA"),
        "correlation": Metric("correlation", "Correlation with the teacher"),
    }
    further_scores = ("cka/", "correlation/")
    pipeline_tag = "image-feature-extraction"
    needs_teacher_in_evaluation = True
    starter = BACKBONE

    @classmethod
    def recognises(cls, architecture: str) -> bool:
        return architecture in MODEL_FOR_BACKBONE_MAPPING_NAMES.values()

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
        return cls(), data

    def build_student(self, config: StudentConfig) -> PreTrainedModel:
        return build_student(config, None, {})

    @classmethod
    def load(cls, folder: str | Path, revision: str | None = None) -> PreTrainedModel:
        return load_backbone(folder, revision=revision)

    def image_processor(self, config: DataConfig) -> BaseImageProcessor:
        return BitImageProcessor(**stretched(config), do_center_crop=False)

    @classmethod
    def eval_transform(cls, config: DataConfig) -> Transform:
        return EvalTransform(config)

    @takes_bytes
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

    @classmethod
    def purpose(cls, config: Mapping[str, Any], size: str, source: str) -> str:
        return f"An image backbone{size} whose feature maps serve dense prediction, {source}, without labels."

    @classmethod
    def usage(cls, config: Mapping[str, Any], name: str) -> tuple[str, str]:
        quoted, model = json.dumps(name), (config.get("architectures") or ["AutoModel"])[0]
        imports, call, own = "", f"{model}.from_pretrained", f", {model}"
        if model == "TimmBackbone":  # its own from_pretrained takes only a timm name
            imports, call, own = "from cankd_hf.models.backbones import load_backbone\n", "load_backbone", ""
        code = (
            f"{imports}from PIL import Image\nfrom transformers import AutoImageProcessor{own}\n\n"
            f'images = AutoImageProcessor.from_pretrained({quoted})(Image.open("photo.jpg"), return_tensors="pt")\n'
            f"for features in {call}({quoted})(**images).feature_maps:\n"
            "    print(features.shape)"
        )
        return code, ""

    @classmethod
    def quick_usage(cls, config: Mapping[str, Any], folder: str) -> str:
        return (
            "from cankd_hf.models.backbones import load_backbone\n"
            f'load_backbone("{folder}")  # or the class named in its config.json, with from_pretrained'
        )

    @classmethod
    def export_form(cls, model: PreTrainedModel, size: tuple[int, int]) -> ExportForm:
        count = len(model(pixel_values=torch.zeros(1, 3, *size)).feature_maps)
        outputs = {f"feature_map_{i}": "[B, C, h, w] float32" for i in range(count)}
        return ExportForm(model, outputs, lambda output: output.feature_maps)
