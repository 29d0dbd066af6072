"""Students from whole models, configurations and backbones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerModel,
    TimmBackbone,
)

from cankd_hf.errors import InputError
from cankd_hf.models import register
from cankd_hf.models.backbones import load_backbone
from cankd_hf.models.students import StudentConfig, build_student

from .kinds import CONVNEXT, IGNORED, KINDS, NAMES, PVT, RESNET, SWIN, TIMM, student

WHOLE = ["resnet_fpn", "timm_psp", "segformer", "upernet", "mobilenet_v2"]


def load(names: dict[int, str], **given: Any) -> PreTrainedModel:
    return build_student(StudentConfig(**given), AutoModelForSemanticSegmentation, names, IGNORED)


def ignored(model: PreTrainedModel) -> int:
    fields = model.config.to_dict()
    return fields.get("semantic_loss_ignore_index", fields.get("loss_ignore_index"))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_saved_student_goes_on_with_its_head(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = student(kind)
    model.save_pretrained(tmp_path)
    again = load(NAMES, model=str(tmp_path))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert ignored(again) == ignored(model) == IGNORED and again.training
    assert "random" not in caplog.text


@pytest.mark.parametrize("kind", WHOLE)
def test_another_class_count_starts_the_classifier_anew(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = student(kind)
    model.save_pretrained(tmp_path)
    names = {i: f"class {i}" for i in range(5)}
    with caplog.at_level(logging.WARNING, logger="cankd_hf"):
        again = load(names, model=str(tmp_path))
    assert "classified 3 classes, the data has 5" in caplog.text
    assert again.config.id2label == names and again.config.num_labels == 5
    old, new = model.state_dict(), again.state_dict()
    changed = {key for key in old if old[key].shape != new[key].shape}
    assert changed and all("classifier" in key or "auxiliary" in key for key in changed)
    assert all(torch.equal(old[key], new[key]) for key in old if key not in changed)
    assert all(torch.isfinite(new[key]).all() and new[key].abs().max() < 10 for key in changed)


def test_an_encoder_without_a_head_gets_one_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = student("segformer").segformer
    assert isinstance(encoder, SegformerModel)
    encoder.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="cankd_hf"):
        model = load(NAMES, model=str(tmp_path))
    assert "no weights for decode_head" in caplog.text
    key = next(iter(encoder.state_dict()))
    assert torch.equal(encoder.state_dict()[key], model.segformer.state_dict()[key])


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    model = student("segformer")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "classifier" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"2 are missing .*decode_head.classifier.bias"):
        load(NAMES, model=str(tmp_path))
    save_file({k: v for k, v in weights.items() if "decode_head" in k}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="segformer"):
        load(NAMES, model=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load(NAMES, model=str(tmp_path))


@pytest.mark.parametrize("family", [RESNET, CONVNEXT, SWIN, PVT, TIMM], ids=lambda family: family["model_type"])
def test_a_pretrained_backbone_survives_under_its_pyramid(family: dict[str, Any], tmp_path: Path) -> None:
    """Whatever stages it was saved with: all of the pyramid are taken, and nothing is initialised over it."""
    backbone = load_backbone(family, out_indices=[-1])
    with torch.no_grad():
        for tensor in backbone.state_dict().values():
            tensor.copy_(torch.rand_like(tensor.float()))
    backbone.save_pretrained(tmp_path)
    model = load(NAMES, backbone=str(tmp_path), fpn={"fpn_channels": 8, "head_channels": 8})
    assert [stride for _, stride in model.levels] == [4, 8, 16, 32]
    inside = model.backbone.state_dict()
    assert all(torch.equal(value, inside[key]) for key, value in backbone.state_dict().items())


NATIVE = {"resnet": RESNET, "convnext": CONVNEXT, "swin": SWIN, "pvt": PVT}


@pytest.mark.parametrize("family", NATIVE)
def test_a_bare_backbone_student_loads_with_its_class(family: str, tmp_path: Path) -> None:
    fields = {**NATIVE[family], "out_indices": [1, 2, 3]}
    model = build_student(StudentConfig(backbone=fields), None, {})
    model.eval().save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and again.config.out_indices == [1, 2, 3]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(images).feature_maps, model(images).feature_maps)


def test_which_calls_of_transformers_load_a_bare_backbone_folder(tmp_path: Path) -> None:
    """The docstring of `build_student` says so; this notices when it changes."""
    for kind, fields in {**NATIVE, "timm": TIMM}.items():
        build_student(StudentConfig(backbone=fields), None, {}).save_pretrained(tmp_path / kind)
        with pytest.raises((OSError, ValueError)):
            AutoBackbone.from_pretrained(tmp_path / kind)
    folder = str(tmp_path / "timm")
    with pytest.raises(ValueError, match="local path"):
        TimmBackbone.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    again = PreTrainedModel.from_pretrained.__func__(TimmBackbone, folder, config=config)
    expected = load_backbone(folder).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of model, config and backbone, got none"),
        ({"model": "a", "config": {}}, "got model and config; keep one"),
        ({"model": "a", "fpn": {"dropout": 0.1}}, "student.fpn: settings of a pyramid"),
        (
            {"backbone": RESNET, "fpn": {"head_chanels": 8}},
            "student.fpn.head_chanels: unknown key; did you mean 'head_channels'",
        ),
        ({"backbone": RESNET, "fpn": {"neck": "pan"}}, "FPNConfig.neck"),
        ({"backbone": RESNET, "fpn": {"strides": [64]}}, "no map of stride 64"),
        ({"backbone": {"model_type": "segformer"}}, "Backbone class"),
        ({"config": RESNET}, "for a plain backbone use student.backbone"),
        ({"config": {"model_type": "segformer", "depth": 1}}, "student.config.depth: no such key"),
        (
            {"config": {**KINDS["upernet"]["config"], "backbone_config": {**RESNET, "depth": 1}}},
            "backbone_config.depth",
        ),
        ({"model": "nobody/nothing"}, "nobody/nothing: expected a local folder"),
    ],
)
def test_bad_students_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(NAMES, **given)


def test_other_refusals(tmp_path: Path) -> None:
    load_backbone(RESNET).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="AutoModelForSemanticSegmentation knows, got 'resnet'"):
        load(NAMES, model=str(tmp_path))
    with pytest.raises(InputError, match="without a pyramid"):
        build_student(StudentConfig(backbone=RESNET, fpn={"head": "psp"}), None, {})
    with pytest.raises(InputError, match="at least 2 classes"):
        load({0: "all"}, backbone=RESNET)


def test_registering_again_changes_nothing() -> None:
    register()
    register()
    assert type(AutoConfig.for_model("cankd_fpn")).__module__.startswith("cankd_hf.")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"config": {**KINDS["segformer"]["config"], "num_labels": 7}}, "student.config.num_labels: expected 3"),
        ({"config": {**KINDS["segformer"]["config"], "id2label": {0: "x"}}}, "student.config.id2label"),
        (
            {"config": {**KINDS["segformer"]["config"], "semantic_loss_ignore_index": 1}},
            "semantic_loss_ignore_index: exp",
        ),
    ],
)
def test_settings_of_the_data_are_not_contradicted(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        load(NAMES, **given)
    assert "as data." in str(caught.value)
