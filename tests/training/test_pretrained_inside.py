"""Native students whose backbone alone starts with weights, and backbones with frozen norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from transformers import AutoModelForObjectDetection, ResNetBackbone, ResNetConfig

from cankd_hf.errors import InputError
from cankd_hf.models.students import StudentConfig, build_student

from .native_detector_configs import HYBRID, PYRAMID, config

NAMES = {0: "red", 1: "green"}


def built(**settings: Any) -> Any:
    return build_student(StudentConfig(**settings), AutoModelForObjectDetection, NAMES, ignore_index=None)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's pretrained weights are random ones that count."""
    create = timm.create_model

    def random(name: str, pretrained: bool = False, **options: Any) -> Any:
        torch.manual_seed(5)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", random)


def test_the_backbone_inside_a_native_student_starts_with_its_weights(tmp_path: Path, weights: None) -> None:
    resnet = ResNetBackbone(ResNetConfig(**{k: v for k, v in PYRAMID.items() if k != "model_type"}))
    resnet.save_pretrained(tmp_path / "resnet")
    inner = {"pretrained": str(tmp_path / "resnet"), "out_features": PYRAMID["out_features"]}
    student = built(config={**config("deformable_detr"), "backbone_config": inner})
    own = student.model.backbone.model.state_dict()
    for name, value in resnet.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(own[name], value), name
    inner = {"pretrained": "timm/resnet10t.c3_in1k", "out_indices": [2, 3, 4]}
    native = {**HYBRID, "model_type": "rt_detr", "encoder_in_channels": [128, 256, 512]}
    for settings in (config("deformable_detr"), native):
        student = built(config={**settings, "backbone_config": inner})
        expected = timm.create_model("resnet10t.c3_in1k", features_only=True, out_indices=(2, 3, 4)).state_dict()
        own = {name: value for name, value in student.state_dict().items() if "layer4.0.conv1" in name}
        assert len(own) == 1 and torch.equal(*own.values(), expected["layer4.0.conv1.weight"])
        student.save_pretrained(tmp_path / "student")
        again = AutoModelForObjectDetection.from_pretrained(tmp_path / "student")
        for name, value in student.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_norms_of_a_timm_backbone_can_be_frozen(tmp_path: Path, weights: None) -> None:
    backbone = {"pretrained": "timm/resnet10t.c3_in1k", "freeze_batch_norm_2d": True}
    student = built(backbone=backbone, fpn={"head": "fcos", "fpn_channels": 32, "head_layers": 1})
    norms = [module for module in student.backbone.modules() if "BatchNorm" in type(module).__name__]
    assert norms and all(type(norm).__name__.startswith("Frozen") for norm in norms)
    before = {name: value.clone() for name, value in student.backbone.named_buffers()}
    student.train()(pixel_values=torch.randn(2, 3, 64, 64), labels=[LABEL, LABEL]).loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in student.backbone.named_buffers())
    student.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in student.state_dict().items())


LABEL = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}


def test_a_backbone_that_has_no_place_is_refused(weights: None) -> None:
    inner = {"pretrained": "timm/resnet10t.c3_in1k", "out_indices": [1, 2, 3, 4]}
    with pytest.raises(InputError, match="student.config"):
        built(config={"model_type": "yolos", **config("yolos"), "backbone_config": inner})
