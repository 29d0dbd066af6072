"""Every native family of transformers that segments instances, tiny, as the fields of its configuration."""

from __future__ import annotations

import copy
from typing import Any

from tests.training.native_detector_configs import FAMILIES as DETECTORS
from tests.training.native_detector_configs import RESNET

SIZE = 64  # of the images that EoMT takes
STAGES = {**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
DETR = {
    **{"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 8, "num_queries": 12},
    **{"decoder_layers": 2, "decoder_ffn_dim": 16, "decoder_attention_heads": 8, "d_model": 64},
}
EOMT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 16, "image_size": SIZE}
EOMT |= {"num_blocks": 2, "num_queries": 12, "num_upscale_blocks": 2, "train_num_points": 64}

# model type -> (the rest of its configuration, strides of the maps that `auto` taps)
FAMILIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "mask2former": (
        {
            **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16},
            **{"encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 16},
            **{"num_queries": 12, "train_num_points": 64, "backbone_config": STAGES},
        },
        [4, 8, 16, 32],
    ),
    "maskformer": (
        {
            **{"fpn_feature_size": 32, "mask_feature_size": 32, "backbone_config": STAGES},
            "decoder_config": {"model_type": "detr", **DETR, "d_model": 32},
        },
        [4, 8, 16],
    ),
    "eomt": ({**EOMT, "mlp_ratio": 2, "num_register_tokens": 0}, [16]),
    "eomt_dinov3": ({**EOMT, "intermediate_size": 32, "num_register_tokens": 1}, [16]),
    "detr": ({**DETR, "backbone_config": STAGES}, [32]),
    "rf_detr": ({**DETECTORS["rf_detr"][0], "intermediate_size": 16}, [16]),
}


def config(model_type: str) -> dict[str, Any]:
    """The fields of one family's configuration, as a recipe gives them."""
    return copy.deepcopy({"model_type": model_type, **FAMILIES[model_type][0]})
