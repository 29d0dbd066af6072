"""One half of each batch without labels: dense detectors and DETR-like students, with and without pseudo-boxes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import set_seed

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.unlabelled import with_unlabelled
from cankd_hf.tasks import DetectionTask, TaskData
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer

from .detection_folders import NAMES, write_boxes
from .native_detector_configs import RESNET, config

SIZE = [64, 96]
FCOS: dict[str, Any] = {"head": "fcos", "head_layers": 1, "fpn_channels": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("unlabelled") / "boxes", 8, 2)


def load(folder: Path, **settings: Any) -> tuple[DetectionTask, TaskData]:
    return DetectionTask.from_data(DataConfig(path=str(folder), image_size=SIZE, scale=[0.9, 1.1], **settings))


def student_of(kind: str) -> StudentConfig:
    if kind in ("fcos", "retinanet", "reppoints", "faster_rcnn"):
        return StudentConfig(backbone=RESNET, fpn={**FCOS, "head": kind, "head_channels": 16})
    return StudentConfig(config=config(kind))


def teacher_of(kind: str) -> Any:
    set_seed(1)
    names = dict(enumerate(NAMES.values()))
    return load_teacher(DetectionTask(names).build_student(student_of(kind)))


def train(data: Any, kind: str, teacher: Any, folder: Path, terms: list[LossTerm], **settings: Any) -> CanKDTrainer:
    set_seed(0)
    task, sets = data
    given: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    given |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, **settings}
    trainer = CanKDTrainer(
        DetectionTask(task.id2label).build_student(student_of(kind)),
        teacher,
        CanKDConfig(str(folder), **given),
        terms=terms if teacher else None,
        task=DetectionTask(task.id2label),
        train_dataset=with_unlabelled(sets.train, sets.unlabelled, 1.0),
    )
    trainer.train()
    return trainer


PSEUDO = LossTerm(loss="pseudo_boxes", weight=2.0, options={"share": 1.0, "floor": 0.001})
MAPS = LossTerm(loss="mse", weight=0.1)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("fcos", "fcos"),
        ("rt_detr", "fcos"),
        pytest.param("fcos", "deformable_detr"),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("retinanet", "fcos"), ("reppoints", "detr"), ("detr", "rt_detr"), ("yolos", "detr"))
        ],
    ],
)
def test_a_batch_of_both_halves(student: str, teacher: str, folder: Path, tmp_path: Path) -> None:
    data = load(folder, unlabelled=str(folder), unlabelled_split="train")
    made = train(data, student, teacher_of(teacher), tmp_path, [MAPS, PSEUDO])
    batch = next(iter(made.get_train_dataloader()))
    assert batch.meta["labelled"].tolist() == [True, True, False, False]
    assert batch["labels"][2] is None and "teacher_pixel_values" in batch
    logged = [entry for entry in made.state.log_history if "loss_task" in entry]
    assert len(logged) == 2 and all(math.isfinite(entry["loss"]) for entry in logged)
    assert logged[-1]["loss_pseudo_boxes"] > 0 and logged[-1]["loss_mse"] > 0
    assert logged[-1]["boxes_an_image/pseudo_boxes"] > 0
    loss = made.distiller.losses["pseudo_boxes"][0]
    assert loss.images.tolist() == [4, 4] and loss.objects.sum() > 0
    weights = dict(made.student.named_parameters())
    assert all(torch.isfinite(value).all() for value in weights.values())
