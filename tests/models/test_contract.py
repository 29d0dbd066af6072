"""What holds for every kind of student."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor, pipeline

from .kinds import FPN_KINDS, IGNORED, KINDS, NAMES, batch, student

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_forward_and_backward(kind: str) -> None:
    model = student(kind)
    images, labels = batch()
    output = model(pixel_values=images, labels=labels)
    output.loss.backward()

    assert model.training
    assert output.loss.shape == () and output.loss.dtype == torch.float32
    assert 0.3 < output.loss.item() / math.log(len(NAMES)) < 3
    assert output.logits.shape[:2] == (2, len(NAMES))
    without = {name for name, p in model.named_parameters() if p.grad is None}
    unused = ("mask_token", "backbone.swin.layernorm", "mobilenet_v2.conv_1x1")  # by the models of transformers
    assert all(any(part in name for part in unused) for name in without), without
    assert model.config.id2label == NAMES and model.config.label2id["car"] == 2


@every_kind
def test_the_ignored_label_counts_for_nothing(kind: str) -> None:
    model = student(kind).eval()
    images, labels = batch()
    other = torch.where(labels == IGNORED, 0, labels)
    with torch.no_grad():
        loss, counted = (model(pixel_values=images, labels=y).loss for y in (labels, other))
    assert torch.isfinite(loss) and loss != counted


@every_kind
@pytest.mark.parametrize("size", [(115, 95), (33, 47)])
def test_odd_sizes(kind: str, size: tuple[int, int]) -> None:
    model = student(kind).eval()
    images, labels = batch(*size, size=1)
    with torch.no_grad():
        output = model(pixel_values=images, labels=labels)
    assert torch.isfinite(output.loss) and torch.isfinite(output.logits).all()


@every_kind
def test_saves_and_loads_the_same(kind: str, tmp_path: Path) -> None:
    model = student(kind)
    images, _ = batch(70, 50)
    model(pixel_values=images)  # running statistics that are not those of a fresh model
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)

    assert type(again) is type(model) and not again.training
    with torch.no_grad():
        # Equal weights; loaded ones lie differently in memory, which picks other kernels now and then.
        torch.testing.assert_close(model(pixel_values=images).logits, again(pixel_values=images).logits)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@every_kind
def test_pipeline(kind: str, tmp_path: Path) -> None:
    student(kind).save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 48, "width": 64}).save_pretrained(tmp_path)
    segments = pipeline("image-segmentation", str(tmp_path))(Image.new("RGB", (50, 40), "red"))
    assert {segment["label"] for segment in segments} <= set(NAMES.values())
    assert all(segment["mask"].size == (50, 40) for segment in segments)


@pytest.mark.parametrize("kind", FPN_KINDS)
def test_checkpoints_of_ours_carry_code_and_student_keys_alone(kind: str, tmp_path: Path) -> None:
    model = student(kind)
    assert {key.split(".")[0] for key in model.state_dict()} <= {"backbone", "neck", "head"}
    model.save_pretrained(tmp_path / "first")
    AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again")
    for folder in ("first", "again"):
        code = sorted(path.name for path in (tmp_path / folder).glob("*.py"))
        assert code == [
            "configuration_cankd_fpn.py",
            "deformable_cankd_fpn.py",
            "levels_cankd_fpn.py",
            "modeling_cankd_fpn.py",
        ]


@pytest.mark.parametrize("kind", FPN_KINDS)
def test_levels_are_what_the_neck_gives(kind: str) -> None:
    model = student(kind).eval()
    images = torch.randn(1, 3, 224, 448)
    with torch.no_grad():
        maps = model(images, output_hidden_states=True).hidden_states
    assert [(x.shape[1], 224 / x.shape[2], 448 / x.shape[3]) for x in maps] == [(c, s, s) for c, s in model.levels]
    assert model(images).hidden_states is None
    logits, first = model(images, output_hidden_states=True, return_dict=False)
    torch.testing.assert_close(first[-1], maps[-1])
    assert logits.shape[1] == len(NAMES)
