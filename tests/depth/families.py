"""Every native depth model, tiny, as the fields of its configuration."""

from __future__ import annotations

from typing import Any

VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
DINOV2 = {
    **{"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2},
    **{"image_size": 56, "patch_size": 14, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False},
}
BEIT = {
    **{"model_type": "beit", **VIT, "image_size": 64, "patch_size": 16, "out_indices": [1, 2, 3, 4]},
    **{"reshape_hidden_states": False, "use_absolute_position_embeddings": False},
}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
# Image sizes that the family takes as they are.
SIZES = {"dpt_dinov2": (56, 56), "depth_anything": (56, 84)}
FAMILIES: dict[str, dict[str, Any]] = {
    "dpt": {
        **{"model_type": "dpt", **VIT, **NECK, "image_size": 64, "patch_size": 16, "is_hybrid": False},
        "backbone_out_indices": [0, 1, 2, 3],
    },
    "dpt_dinov2": {"model_type": "dpt", "backbone_config": DINOV2, **NECK},
    "depth_anything": {
        **{"model_type": "depth_anything", "backbone_config": DINOV2, **NECK},
        **{"reassemble_hidden_size": 16, "head_hidden_size": 8},
    },
    "glpn": {
        **{"model_type": "glpn", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        **{"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8},
    },
    "zoedepth": {
        **{"model_type": "zoedepth", "backbone_config": BEIT, **NECK, "bottleneck_features": 16},
        **{"num_relative_features": 8, "bin_embedding_dim": 8, "num_attractors": [4, 2, 2, 1]},
    },
}
