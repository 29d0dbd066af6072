"""Tiny students with masks, and pictures of coloured objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.seeds import seeded
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn_instances import FPNForInstanceSegmentation
from cankd_hf.tasks import InstanceSegmentationTask
from tests.models.kinds import DINOV2, NAMES, RESNET

SMALL: dict[str, Any] = {"fpn_channels": 8, "head_layers": 1, "head_channels": 16, "masks": True}
KINDS: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"backbone_config": RESNET, "head": "faster_rcnn"},
    "cascade_rcnn": {"backbone_config": RESNET, "head": "cascade_rcnn"},
    "openmmlab": {"backbone_config": RESNET, "head": "cascade_rcnn", "conventions": "openmmlab"},
    "dinov2": {"backbone_config": DINOV2, "head": "faster_rcnn", "neck": "simple_pyramid"},
}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}  # without BatchNorm
SIZES = {"train": 8, "validation": 7, "test": 4, "size": 64}


def student(kind: str, **changes: Any) -> FPNForInstanceSegmentation:
    """Of this kind, in train mode; keywords change its configuration."""
    settings = {**SMALL, "id2label": NAMES, **KINDS[kind], **changes}
    label2id = {name: index for index, name in settings["id2label"].items()}
    with seeded(0):
        return FPNForInstanceSegmentation(FPNConfig(**settings, label2id=label2id)).train()


def pictures(height: int = 128, width: int = 192) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Two images `[2, 3, H, W]` with two ellipses each, and their labels."""
    images, labels = 0.1 * torch.randn(2, 3, height, width), []
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for image in images:
        kinds, boxes, masks = torch.randint(0, len(NAMES), (2,)), [], []
        for place, kind in enumerate(kinds.tolist()):
            w, h = (int(torch.randint(24, side, ())) for side in (width // 2 - 4, height - 8))
            left, top = (int(torch.randint(0, room, ())) for room in (width // 2 - w, height - h))
            left += place * (width // 2)
            inside = ((x - left - w / 2) / (w / 2)) ** 2 + ((y - top - h / 2) / (h / 2)) ** 2 < 1
            image[kind][inside] = 1.0
            masks.append(inside)
            boxes.append([(left + w / 2) / width, (top + h / 2) / height, w / width, h / height])
        labels.append({"class_labels": kinds, "boxes": torch.tensor(boxes), "masks": torch.stack(masks)})
    return images, labels


def generated(**settings: Any) -> tuple[InstanceSegmentationTask, Any]:
    """The task and the data of generated objects."""
    given = {"generated": SIZES, "image_size": [64, 64], "scale": [1.0, 1.0], "flip": 0.0, **settings}
    task, data = InstanceSegmentationTask.from_data(DataConfig(path="shapes", **given))
    assert isinstance(task, InstanceSegmentationTask)
    return task, data
