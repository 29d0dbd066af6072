"""Every kind of detector, tiny and with random weights, and pictures of coloured boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection

from .kinds import CONVNEXT, DINOV2, NAMES, RESNET, TIMM

SMALL = {"fpn_channels": 8, "head_layers": 1}
DETECTORS: dict[str, dict[str, Any]] = {
    "retinanet_resnet": {"backbone_config": RESNET, "head": "retinanet"},
    "fcos_resnet": {"backbone_config": RESNET, "head": "fcos"},
    "faster_rcnn_resnet": {"backbone_config": RESNET, "head": "faster_rcnn", "head_channels": 16},
    "cascade_rcnn_resnet": {"backbone_config": RESNET, "head": "cascade_rcnn", "head_channels": 16},
    "reppoints_resnet": {"backbone_config": RESNET, "head": "reppoints"},
    "retinanet_group_convnext": {"backbone_config": CONVNEXT, "head": "retinanet", "norm": "group"},
    "fcos_dinov2": {"backbone_config": DINOV2, "head": "fcos", "neck": "simple_pyramid"},
    "faster_rcnn_dinov2": {
        "backbone_config": DINOV2,
        "head": "faster_rcnn",
        "head_channels": 16,
        "neck": "simple_pyramid",
    },
    "reppoints_dinov2": {"backbone_config": DINOV2, "head": "reppoints", "neck": "simple_pyramid"},
    "retinanet_timm": {"backbone_config": {**TIMM, "backbone": "mobilenetv3_small_050"}, "head": "retinanet"},
}
COLOURS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
Labels = list[dict[str, Tensor]]


def detector(kind: str, **changes: Any) -> FPNForObjectDetection:
    """The detector of this kind, in train mode; keywords change its configuration."""
    settings = {**SMALL, **DETECTORS[kind], **changes}
    label2id = {name: index for index, name in NAMES.items()}
    return FPNForObjectDetection(FPNConfig(**settings, id2label=NAMES, label2id=label2id)).train()


def pictures(count: int = 2, height: int = 64, width: int = 96) -> tuple[Tensor, Labels]:
    """Images `[B, 3, H, W]` of two coloured boxes each on noise, side by side; the colour is the class."""
    images = 0.1 * torch.randn(count, 3, height, width)
    labels = []
    for image in images:
        classes, boxes = torch.randint(0, len(NAMES), (2,)), []
        for i, kind in enumerate(classes.tolist()):
            w, h = (int(torch.randint(16, side, ())) for side in (width // 2 - 4, height - 8))
            x, y = (int(torch.randint(0, room, ())) for room in (width // 2 - w, height - h))
            x += i * (width // 2)
            image[:, y : y + h, x : x + w] = COLOURS[kind, :, None, None]
            boxes.append([x / width, y / height, (x + w) / width, (y + h) / height])
        labels.append({"class_labels": classes, "boxes": box_convert(torch.tensor(boxes), "xyxy", "cxcywh")})
    return images, labels
