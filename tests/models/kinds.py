"""Every kind of student, tiny and with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from cankd_hf.models.students import StudentConfig, build_student

NAMES = {0: "sky", 1: "road", 2: "car"}
IGNORED = 9

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
PVT = {
    "model_type": "pvt_v2",
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}
HGNET = {  # says 8 channels for stage 1, gives 12
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "stem_channels": [3, 4, 8],
    "stage_in_channels": [8, 12, 16, 16],
    "stage_mid_channels": [4, 4, 4, 4],
    "stage_out_channels": [12, 16, 16, 24],
    "hidden_sizes": [8, 16, 16, 24],
    "depths": [1, 1, 1, 1],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "image_size": 28,
    "patch_size": 14,
}
TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet"}
SMALL = {"fpn_channels": 8, "head_channels": 8}

# What `StudentConfig` takes for each.
KINDS: dict[str, dict[str, Any]] = {
    "resnet_fpn": {"backbone": RESNET, "fpn": SMALL},
    "resnet_fpn_group": {"backbone": RESNET, "fpn": {**SMALL, "strides": [8, 16, 32], "norm": "group"}},
    "convnext_fpn": {"backbone": CONVNEXT, "fpn": {**SMALL, "head_layers": 2}},
    "swin_fpn": {"backbone": SWIN, "fpn": SMALL},
    "pvt_fpn": {"backbone": PVT, "fpn": SMALL},
    "hgnet_fpn": {"backbone": HGNET, "fpn": SMALL},
    "timm_fpn": {"backbone": {**TIMM, "backbone": "mobilenetv3_small_050"}, "fpn": SMALL},
    "dinov2_pyramid": {"backbone": DINOV2, "fpn": {**SMALL, "neck": "simple_pyramid"}},
    "timm_psp": {
        "backbone": {**TIMM, "output_stride": 8},
        "fpn": {"head": "psp", "head_channels": 8, "auxiliary_weight": 0.4},
    },
    "timm_aspp": {
        "backbone": {**TIMM, "output_stride": 8},
        "fpn": {"head": "aspp", "head_channels": 8, "atrous_rates": [2, 4]},
    },
    "segformer": {
        "config": {
            "model_type": "segformer",
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 8,
        }
    },
    "upernet": {
        "config": {
            "model_type": "upernet",
            "backbone_config": {**RESNET, "out_indices": [1, 2, 3, 4]},
            "hidden_size": 8,
            "auxiliary_channels": 8,
            "auxiliary_in_channels": 16,
        }
    },
    "mobilenet_v2": {"config": {"model_type": "mobilenet_v2", "depth_multiplier": 0.1, "min_depth": 4}},
}
FPN_KINDS = [name for name, given in KINDS.items() if "backbone" in given]


def student(kind: str, **fpn: Any) -> PreTrainedModel:
    """The student of this kind; keywords change its pyramid."""
    given = dict(KINDS[kind])
    if fpn:
        given["fpn"] = {**given["fpn"], **fpn}
    return build_student(StudentConfig(**given), AutoModelForSemanticSegmentation, NAMES, IGNORED)


def batch(height: int = 64, width: int = 64, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, some pixels ignored."""
    labels = torch.randint(0, len(NAMES), (size, height, width))
    labels[:, : height // 4] = IGNORED
    return torch.randn(size, 3, height, width), labels
