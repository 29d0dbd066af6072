"""What holds for every depth student: a loss, save and load, a step of distillation; and for native teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForDepthEstimation, DPTImageProcessor, PreTrainedModel, pipeline

from cankd_hf import CanKDConfig, CanKDTrainer
from cankd_hf.config.data import DepthConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.errors import InputError
from cankd_hf.tasks import DepthTask, saved_task, task_for
from cankd_hf.teachers.load import load_teacher
from tests.processes import forked

from .families import FAMILIES, RESNET, SIZES

FPN = {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}}
KINDS: dict[str, dict[str, Any]] = {"fpn": FPN, **{name: {"config": config} for name, config in FAMILIES.items()}}


def student(family: str, **depth: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return DepthTask(DepthConfig(**depth)).build_student(StudentConfig(**KINDS[family]))


def batch(kind: str) -> dict[str, torch.Tensor]:
    size = SIZES.get(kind, (64, 64))
    labels = torch.rand(2, *size) * 5 + 0.5
    labels[:, :8] = 0
    return {"pixel_values": torch.randn(2, 3, *size), "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_learns_and_loads_again(kind: str, tmp_path: Path) -> None:
    model = student(kind, max=10.0)
    found = model(**batch(kind))
    found.loss.backward()
    assert torch.isfinite(found.loss) and any(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    assert saved_task(str(tmp_path)) is DepthTask
    again, images = AutoModelForDepthEstimation.from_pretrained(tmp_path), batch(kind)["pixel_values"]
    torch.testing.assert_close(again(pixel_values=images).predicted_depth, model(pixel_values=images).predicted_depth)
    assert task_for(again).config.kind == "metric" and again(**batch(kind)).loss is not None


def images(kind: str, count: int) -> list[dict[str, torch.Tensor]]:
    inputs = [batch(kind) for _ in range(count)]
    return [{name: value[0] for name, value in one.items()} for one in inputs]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_of_every_family(kind: str, tmp_path: Path) -> None:
    """As a student of a native teacher of its own kind, of relative depth, and scored."""
    model, teacher = student(kind, kind="relative"), student(kind, max=10.0)
    args = CanKDConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none")
    trainer = CanKDTrainer(model, teacher, args, train_dataset=images(kind, 4), eval_dataset=images(kind, 2))
    assert trainer.train().training_loss > 0
    scores = trainer.evaluate()
    assert 0 <= scores["eval_delta1"] <= 1 and scores["eval_abs_rel"] >= 0


@pytest.mark.parametrize("kind", FAMILIES)
def test_native_models_are_teachers(kind: str) -> None:
    teacher = load_teacher(student(kind))
    size = SIZES.get(kind, (64, 64))
    maps = teacher(torch.randn(1, 3, *size))
    assert [level.channels for level in teacher.levels(size)] == [one.shape[1] for one in maps] and len(maps) >= 1


def test_each_loss_and_bound_is_where_the_recipe_put_it() -> None:
    model = student("fpn", max=7.0, loss="log_l1")
    assert (model.config.max_depth, model.config.depth_loss, model.config.depth_kind) == (7.0, "log_l1", "metric")
    assert model(torch.randn(1, 3, 40, 56)).predicted_depth.shape == (1, 40, 56)
    assert model(torch.randn(1, 3, 40, 56)).predicted_depth.max() <= 7
    native = student("depth_anything", max=20.0)
    assert native.config.depth_estimation_type == "metric" and native.head.max_depth == 20
    assert student("depth_anything", kind="relative").config.depth_estimation_type == "relative"
    with pytest.raises(InputError, match=r"student\.fpn\.max_depth: data\.depth decides it"):
        DepthTask().build_student(StudentConfig(backbone=RESNET, fpn={"max_depth": 3.0}))
    with pytest.raises(InputError, match="expected one of ssi, ssi_mad for relative depth"):
        DepthTask(DepthConfig(kind="relative", loss="silog")).build_student(StudentConfig(**FPN))


def test_relative_and_metric_scores_are_not_put_side_by_side() -> None:
    assert DepthTask().why_not_scored(student("depth_anything", kind="relative")) is not None
    assert DepthTask().why_not_scored(student("glpn")) is None


def test_labels_without_any_depth_give_no_loss_and_no_gradient_trouble() -> None:
    model = student("dpt", loss="log_l1")
    loss = model(torch.randn(1, 3, 64, 64), labels=torch.zeros(1, 64, 64)).loss
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


WITHOUT = """
import sys, torch
sys.modules["cankd_hf"] = None
from PIL import Image
from transformers import pipeline
found = pipeline("depth-estimation", "student", trust_remote_code=True)(Image.new("RGB", (50, 40), "red"))
assert found["predicted_depth"].shape == (40, 50) and found["depth"].size == (50, 40)
torch.save(found["predicted_depth"], "depth.pt")
"""


@pytest.mark.slow
def test_a_pipeline_with_and_without_cankd_hf(tmp_path: Path) -> None:
    student("fpn", max=10.0).eval().save_pretrained(tmp_path / "student")
    DPTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "student")
    code = {path.name for path in (tmp_path / "student").glob("*.py")}
    assert code == {
        *(f"{name}_cankd_fpn.py" for name in ("configuration", "deformable", "levels", "modeling", "depth_losses")),
        "modeling_cankd_fpn_depth.py",
    }
    ours = pipeline("depth-estimation", str(tmp_path / "student"))(Image.new("RGB", (50, 40), "red"))
    assert forked(["-c", WITHOUT], cwd=tmp_path).returncode == 0
    torch.testing.assert_close(torch.load(tmp_path / "depth.pt"), ours["predicted_depth"])
