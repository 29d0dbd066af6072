"""A model that is not here and cannot be fetched: its key in the recipe is named, and a folder as the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cankd_hf.errors import InputError
from cankd_hf.models.unreadable import NotFetched
from cankd_hf.runs import adapting
from cankd_hf.runs.build import build_student, build_teacher
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.runs.students import _of
from cankd_hf.tasks import InstanceSegmentationTask
from cankd_hf.teachers.load import load_teacher
from tests.models.kinds import NAMES, RESNET

ELSEWHERE = "nobody/has-this"
NATIVE = {"model_type": "mask2former", "backbone_config": {"pretrained": ELSEWHERE}}


def recipe(student: Mapping[str, Any], **sections: Any) -> Any:
    base = {"task": "instance-segmentation", "output_dir": "runs/x", "data": {"path": "shapes"}, "student": student}
    taught = {"distill": {"terms": [{"loss": "cankd", "teacher": "a"}]}} if "teachers" in sections else {}
    return parse_recipe(yaml.safe_dump({**base, **taught, **sections}))


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("student", "key"),
    [
        ({"model": ELSEWHERE}, "student.model"),
        ({"backbone": ELSEWHERE}, "student.backbone"),
        ({"backbone": "timm/resnet18"}, "student.backbone"),
        ({"backbone": {"pretrained": "resnet18", "out_indices": [1, 2, 3, 4]}}, "student.backbone.pretrained"),
        ({"config": NATIVE}, "student.config.backbone_config.pretrained"),
    ],
)
def test_a_student_that_is_elsewhere(student: dict[str, Any], key: str) -> None:
    task = InstanceSegmentationTask(NAMES)
    with pytest.raises(InputError, match=rf"^{key}: .*; or name a local folder: {key}=FOLDER$") as caught:
        build_student(recipe(student), task)
    assert len(caught.value.problems) == 1 and "model_type" not in str(caught.value)


def test_a_teacher_that_is_elsewhere() -> None:
    mine = {"backbone": RESNET}
    for name in (ELSEWHERE, "timm/resnet18"):
        alone = recipe(mine, teacher={"model": name})
        with pytest.raises(InputError, match=r"^teacher\.model: .*; or name a local folder: teacher\.model=FOLDER$"):
            build_teacher(alone, "teacher", alone.teacher)
    several = recipe(mine, teachers={"a": {"model": ELSEWHERE, "adapt": {"tune": "head"}}, "b": {"config": RESNET}})
    with pytest.raises(InputError, match=r"^teachers\.a\.model: .*: teachers\.a\.model=FOLDER$"):
        build_student(several, InstanceSegmentationTask(NAMES), adapting.untrained(several.teachers["a"]), "a")
    with pytest.raises(NotFetched) as caught:  # from Python there is no recipe
        load_teacher(ELSEWHERE)
    assert "FOLDER" not in str(caught.value)


def test_what_is_wrong_with_a_teacher_is_not_told_of_the_student() -> None:
    task = InstanceSegmentationTask(NAMES)
    without = {"model_type": "cankd_fpn", "head": "fcos", "backbone_config": RESNET}
    fitted = recipe({"backbone": RESNET}, teacher={"config": without, "fit": {"max_steps": 1}})
    with pytest.raises(InputError, match=r"^teacher\.config: cankd_fpn .* expected masks: true, .*set masks to true"):
        build_student(fitted, task, adapting.untrained(fitted.teacher))
    several = recipe(
        {"backbone": RESNET},
        teachers={
            "a": {"config": RESNET, "adapt": {"tune": "head", "fpn": {"head": "fcos"}}},
            "b": {"config": RESNET},
        },
    )
    wrong = replace(adapting.untrained(several.teachers["a"]), fpn={"haed": "fcos"})
    with pytest.raises(InputError, match=r"^teachers\.a\.adapt\.fpn\.haed: unknown key"):
        build_student(several, task, wrong, "a")
    for head, said in (("depth", "FPNForDepthEstimation"), ("psp", "FPNForSemanticSegmentation")):
        with pytest.raises(
            InputError, match=f"'{head}' is a head for {said}; set head to one of faster_rcnn, cascade"
        ):
            build_student(recipe({"backbone": RESNET, "fpn": {"head": head, "masks": False}}), task)


def test_what_is_here_is_not_to_be_named_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(InputError, match="its pretrained weights cannot be loaded") as caught:
        build_student(recipe({"backbone": str(tmp_path)}), InstanceSegmentationTask(NAMES))
    assert f"check the files in {tmp_path}" in str(caught.value) and "FOLDER" not in str(caught.value)


def test_of_several_students_the_keys_are_theirs() -> None:
    said = "student.backbone: x: not there; or name a local folder: student.backbone=FOLDER"
    assert _of("a", said) == ("students.a.backbone: x: not there; or name a local folder: students.a.backbone=FOLDER")
    assert _of("a", "data.path: none") == "students.a: data.path: none"
