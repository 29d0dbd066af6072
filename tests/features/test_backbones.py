"""Backbones of every kind give ordered maps of honest strides, as students and as teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.features import Taps
from cankd_hf.models.backbones import load_backbone
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.teachers.load import load_teacher

PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
MLP = {"intermediate_size": 32}
VIT16 = {**VIT, "image_size": 64, "patch_size": 16}
SWIN = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4}
HGNET = {
    **{"embedding_size": 8, "stem_channels": [3, 8, 8], "hidden_sizes": [8, 8, 16, 16]},
    **{"stage_in_channels": [8, 8, 8, 16], "stage_mid_channels": [8] * 4, "stage_out_channels": [8, 8, 16, 16]},
    **{"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4, "depths": [1] * 4},
}
PVT = {
    **{"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]},
    **{"mlp_ratios": [2] * 4},
}
PYRAMIDS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 8, **PYRAMID},
    "convnext": PYRAMID,
    "convnextv2": PYRAMID,
    "dinov3_convnext": PYRAMID,
    "swin": SWIN,
    "swinv2": SWIN,
    "pvt_v2": PVT,
    "hgnet_v2": HGNET,
    "bit": {"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [1] * 4, "num_groups": 8},
    "timm_backbone": {"backbone": "mobilenetv3_small_050"},
}
PLAIN: dict[str, dict[str, Any]] = {
    "dinov2": VIT,
    "dinov2_with_registers": {**VIT, "num_register_tokens": 2},
    "dinov3_vit": {**VIT16, **MLP, "num_register_tokens": 2},
    "beit": {**VIT16, **MLP},
    "vit": {**VIT16, **MLP},
    "deit": {**VIT16, **MLP},
    "siglip_vision_model": {**VIT16, **MLP},
    "clip_vision_model": {**VIT16, **MLP},
}


@pytest.mark.parametrize("kind", PYRAMIDS)
@pytest.mark.parametrize("size", [(128, 128), (230, 190)])
def test_pyramids(kind: str, size: tuple[int, int]) -> None:
    teacher = load_teacher(TeacherConfig(config={"model_type": kind, **PYRAMIDS[kind]}))
    levels = teacher.levels(size)
    assert [level.stride for level in levels] == pytest.approx([4, 8, 16, 32], rel=0.15)
    maps = teacher(torch.randn(1, 3, *size))
    assert [(m.shape[1], tuple(m.shape[2:])) for m in maps] == [(level.channels, level.size) for level in levels]


def test_focalnet_gives_two_maps_of_one_stride() -> None:
    config = {"model_type": "focalnet", "embed_dim": 8, "depths": [1] * 4, "focal_levels": [1] * 4, "patch_size": 4}
    config |= {"focal_windows": [3] * 4, "hidden_sizes": [8, 16, 32, 64]}
    levels = load_teacher(TeacherConfig(config=config)).levels((128, 128))
    assert [round(level.stride) for level in levels] == [8, 16, 32, 32]


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_transformers_take_any_size(kind: str) -> None:
    teacher = load_teacher(TeacherConfig(config={"model_type": kind, **PLAIN[kind]}))
    patch = PLAIN[kind]["patch_size"]
    (level,) = teacher.levels((230, 190))
    assert level.size == (round(230 / patch), round(190 / patch))
    assert level.stride == pytest.approx(patch, rel=0.05)
    (found,) = teacher(torch.randn(2, 3, 230, 190))
    assert found.shape == (2, 16, *level.size)
    assert found.std() > 0


def test_stages_by_name() -> None:
    config = {"model_type": "dinov2", **VIT}
    teacher = load_teacher(TeacherConfig(config=config), taps=["stage1", "stage2"])
    assert len(teacher.levels((56, 56))) == 2
    assert teacher.manifest()["taps"] == ["stage1", "stage2"]
    resnet = load_teacher(TeacherConfig(config={"model_type": "resnet", **PYRAMIDS["resnet"]}), taps=["stage4"])
    assert [round(level.stride) for level in resnet.levels((128, 128))] == [32]


def test_odd_one_out_timm_vit_has_one_size() -> None:
    teacher = load_teacher(TeacherConfig(config={"model_type": "timm_backbone", "backbone": "vit_tiny_patch16_224"}))
    assert teacher.stats.mean == (0.5, 0.5, 0.5)
    (level,) = teacher.levels((64, 96))
    assert level.size == (14, 14)
    assert len(teacher(torch.randn(1, 3, 64, 96))) == 1


def test_a_backbone_student_keeps_its_training_state() -> None:
    model = load_backbone({"model_type": "resnet", **PYRAMIDS["resnet"], "out_indices": [1, 2, 3, 4]}).train()
    frozen = model.encoder.stages[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    Taps(model).levels((64, 64))
    assert model.training and not any(module.training for module in frozen.modules())
    assert model.encoder.stages[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("values", "tap", "strides"),
    [
        ({"neck": "fpn", "head": "fpn"}, "neck", [4, 8, 16, 32]),
        ({"neck": "none", "head": "psp"}, "backbone:-1", [32]),
        ({"neck": "none", "head": "aspp"}, "backbone:-1", [32]),
    ],
)
def test_our_own_models_as_teachers(values: dict[str, Any], tap: str, strides: list[int], tmp_path: Path) -> None:
    config = FPNConfig(
        backbone_config={"model_type": "resnet", **PYRAMIDS["resnet"], "out_indices": [1, 2, 3, 4]},
        **{"fpn_channels": 16, "head_channels": 16, "num_labels": 3, **values},
    )
    FPNForSemanticSegmentation(config).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.manifest()["taps"] == [tap]
    assert [round(level.stride) for level in teacher.levels((128, 128))] == strides
    assert len(teacher(torch.randn(1, 3, 100, 90))) == len(strides)
