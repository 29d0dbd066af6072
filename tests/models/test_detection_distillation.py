"""Detectors as teacher and student: the neck's maps, the first four of five levels paired."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from cankd_hf.config.distill import LossTerm
from cankd_hf.features import Taps
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.distiller import Distiller

from .detectors import detector, pictures

SIZE = (64, 96)


@pytest.mark.parametrize(
    ("teacher_kind", "student_kind"),
    [
        ("retinanet_resnet", "retinanet_resnet"),
        ("fcos_dinov2", "retinanet_resnet"),
        ("fcos_resnet", "fcos_resnet"),
        ("fcos_resnet", "reppoints_resnet"),
    ],
)
def test_a_saved_detector_teaches_another(teacher_kind: str, student_kind: str, tmp_path: Path) -> None:
    detector(teacher_kind, fpn_channels=12).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    student = detector(student_kind)
    levels = teacher.levels(SIZE)
    assert [level.stride for level in levels[:3]] == [8, 16, 32] and len(levels) == 5
    term = LossTerm(loss="instance_mse", weight=1.0, pairs=[[i, i] for i in range(4)])
    distiller = Distiller(student, [term], levels, image_size=SIZE)
    images, labels = pictures()
    result = distiller(images, labels=labels, teachers={"teacher": teacher(images)})
    result["loss"].backward()
    assert list(result.parts) == ["task", *(f"instance_mse/s{i}t{i}" for i in range(4))]
    assert all(torch.isfinite(part) and part > 0 for part in result.parts.values())
    assert result.logits is None  # in training nobody asks for detections
    finest = next(iter(student.neck.pyramid.layer_blocks)).get_submodule("0").weight
    assert finest.grad is not None and finest.grad.abs().sum() > 0
    with torch.no_grad():
        evaluated = distiller.eval()(images, labels=labels)
    assert evaluated["outputs"].pred_boxes.shape[0] == len(images)


def test_maps_show_the_image_and_not_the_padding() -> None:
    """72x80 images are padded to 96x96; a teacher that does not pad would compare its maps with black rows."""
    model = detector("fcos_resnet").eval()
    images = torch.randn(2, 3, 72, 80)
    levels = Taps(model).levels((72, 80))
    assert [level.size for level in levels] == [(9, 10), (5, 5), (3, 3), (2, 2), (1, 1)]
    assert [level.stride for level in levels] == [8, 16, 32, 48, 96]  # 96 pixels in 2 cells and in 1
    with torch.no_grad():
        whole = model(images, output_hidden_states=True).hidden_states
        cut = Taps(model).run(images)
    for level, ours in zip(whole, cut, strict=True):
        assert torch.equal(ours, level[..., : ours.shape[-2], : ours.shape[-1]])
    # A plain ViT stretches its images: nothing of its maps is cut off.
    vit = detector("fcos_dinov2").eval()
    with torch.no_grad():
        whole = vit(torch.randn(2, 3, 64, 90), output_hidden_states=True).hidden_states
    assert [level.size for level in Taps(vit).levels((64, 90))] == [tuple(x.shape[-2:]) for x in whole]


def test_a_copy_is_a_model_of_its_own() -> None:
    """An average of weights over the run starts with a copy."""
    model = detector("faster_rcnn_resnet").eval()
    other = copy.deepcopy(model)
    images, labels = pictures()
    with torch.no_grad():
        expected = model(images, labels=labels).loss
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(other(images, labels=labels).loss, expected)
