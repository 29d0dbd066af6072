"""Every native detector of transformers, tiny, as the fields of its configuration; and a tokenizer for two of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BertTokenizer

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
PYRAMID = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
LAST = {**RESNET, "out_features": ["stage4"]}
VIT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 16}
TRANSFORMER = {
    **{"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2, "num_queries": 12},
    **{"decoder_layers": 2, "decoder_ffn_dim": 16, "decoder_attention_heads": 2},
}
DETR = {**TRANSFORMER, "d_model": 32, "backbone_config": LAST}
HYBRID = {
    **{**TRANSFORMER, "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16]},
    **{"decoder_in_channels": [32] * 3, "num_denoising": 4, "backbone_config": PYRAMID},
}
WINDOWED = {
    **{"d_model": 32, "num_queries": 12, "decoder_layers": 2, "decoder_ffn_dim": 16, "group_detr": 2},
    **{"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2},
}
BERT = {"model_type": "bert", "vocab_size": 1100, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUNDING = {
    **{**TRANSFORMER, "d_model": 32, "num_feature_levels": 4, "max_text_len": 32},
    "backbone_config": PYRAMID,
    "text_config": {**BERT, "intermediate_size": 16},
}

# model type -> (the rest of its configuration, strides of the maps that `auto` taps)
FAMILIES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "rt_detr": ({**HYBRID, "backbone_config": {**PYRAMID, "model_type": "rt_detr_resnet"}}, [8, 16, 32]),
    "rt_detr_v2": ({**HYBRID, "backbone_config": {**PYRAMID, "model_type": "rt_detr_resnet"}}, [8, 16, 32]),
    "d_fine": (HYBRID, [8, 16, 32]),
    "deimv2": (HYBRID, [8, 16, 32]),
    "deformable_detr": ({**DETR, "backbone_config": PYRAMID}, [8, 16, 32, 64]),
    "conditional_detr": (DETR, [32]),
    "dab-detr": ({**TRANSFORMER, "hidden_size": 32, "backbone_config": LAST}, [32]),
    "detr": (DETR, [32]),
    "table-transformer": (DETR, [32]),
    "yolos": ({**VIT, "image_size": [64, 96], "num_detection_tokens": 12, "intermediate_size": 16}, [16]),
    "lw_detr": (
        {
            **{**WINDOWED, "projector_scale_factors": [2.0, 1.0, 0.5]},
            "backbone_config": {
                **{**VIT, "model_type": "lw_detr_vit", "image_size": 64, "num_windows": 4},
                **{"out_indices": [2, 4], "window_block_indices": [0, 2]},
            },
        },
        [8, 16, 32],
    ),
    "rf_detr": (
        {
            **WINDOWED,
            "backbone_config": {
                **{**VIT, "model_type": "rf_detr_dinov2", "image_size": 64},
                **{"num_windows": 2, "out_indices": [2, 4]},
            },
        },
        [16],
    ),
    "grounding-dino": (GROUNDING, [8, 16, 32, 64]),
    "mm-grounding-dino": (GROUNDING, [8, 16, 32, 64]),
}

# Ours on the parts of transformers; its stem is trained, or half of so thin a backbone would stand still.
DINO = {
    **{**DETR, "backbone_config": PYRAMID, "freeze_stem": False, "num_denoising": 8},
    **{"decoder_layers": 3, "encoder_n_points": 2, "decoder_n_points": 2},
}


def config(model_type: str) -> dict[str, Any]:
    """The fields of one family's configuration, as a recipe gives them."""
    return {"model_type": model_type, **(DINO if model_type == "cankd_dino" else FAMILIES[model_type][0])}


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of a few words in which [CLS], [SEP], `.` and `?` have BERT's numbers; returns its folder."""
    vocabulary = [f"[unused{number}]" for number in range(1100)]
    places = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    words = ["red", "green", "blue", "cell", "blood", "plate", "##lets"]
    for place, word in {**places, **dict(enumerate(words, start=1030))}.items():
        vocabulary[place] = word
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
