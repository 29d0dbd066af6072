"""One half of each batch without labels: dense detectors and DETR-like students, with and without pseudo-boxes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.unlabelled_stream import with_unlabelled
from cankd_hf.errors import InputError
from cankd_hf.tasks import DetectionTask, TaskData
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer
from tests.processes import run_two

from .detection_folders import NAMES, write_boxes
from .detector_trainers import taught_trainer
from .native_detector_configs import RESNET, config
from .tiny_trainers import largest_difference, weights

SIZE = [64, 96]
GIVEN: dict[str, Any] = {
    **{"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
    **{"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
}
FCOS: dict[str, Any] = {"head": "fcos", "head_layers": 1, "fpn_channels": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("unlabelled") / "boxes", 8, 2)


def load(folder: Path, **settings: Any) -> tuple[DetectionTask, TaskData]:
    return DetectionTask.from_data(DataConfig(path=str(folder), image_size=SIZE, scale=[0.9, 1.1], **settings))


def others(folder: Path) -> dict[str, str]:
    """The same images again, without labels."""
    return {"unlabelled": str(folder), "unlabelled_split": "train"}


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
    trainer = CanKDTrainer(
        DetectionTask(task.id2label).build_student(student_of(kind)),
        teacher,
        CanKDConfig(str(folder), **{**GIVEN, **settings}),
        terms=terms if teacher else None,
        task=DetectionTask(task.id2label),
        train_dataset=with_unlabelled(sets.train, sets.unlabelled, 1.0),
    )
    trainer.train()
    return trainer


PSEUDO = LossTerm(loss="pseudo_boxes", weight=2.0, options={"share": 1.0, "floor": 0.001})
MAPS = LossTerm(loss="mse", weight=0.1, pairs=[[0, 0]])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("fcos", "fcos"),
        ("rt_detr", "fcos"),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ("fcos", "deformable_detr"),
                ("retinanet", "fcos"),
                ("reppoints", "rt_detr"),
                ("detr", "rt_detr"),
                ("yolos", "fcos"),
            )
        ],
    ],
)
def test_a_batch_of_both_halves(student: str, teacher: str, folder: Path, tmp_path: Path) -> None:
    data = load(folder, **others(folder))
    made = train(data, student, teacher_of(teacher), tmp_path, [MAPS, PSEUDO])
    batch = next(iter(made.get_train_dataloader()))
    assert batch.meta["labelled"].tolist() == [True, True, False, False]
    assert batch["labels"][2] is None and "teacher_pixel_values" in batch
    logged = [entry for entry in made.state.log_history if "loss_task" in entry]
    assert len(logged) == 2 and all(math.isfinite(entry["loss"]) for entry in logged)
    assert logged[-1]["loss_pseudo_boxes"] > 0 and logged[-1]["loss_mse"] > 0
    assert logged[-1]["boxes_an_image/pseudo_boxes"] > 0
    assert any(name.startswith("kept/pseudo_boxes/") for name in logged[-1])
    loss = made.distiller.losses["pseudo_boxes"][0]
    assert loss.images.tolist() == [4, 4] and loss.objects.sum() > 0
    weights = dict(made.student.named_parameters())
    assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("student", ["fcos", pytest.param("rt_detr", marks=pytest.mark.slow)])
def test_without_a_teacher_the_unlabelled_half_changes_nothing(student: str, folder: Path, tmp_path: Path) -> None:
    """Bit for bit, BatchNorm and denoising included."""
    kept = []
    for settings in ({}, others(folder)):
        made = train(load(folder, **settings), student, None, tmp_path, [], per_device_train_batch_size=2)
        kept.append({name: value.clone() for name, value in made.student.state_dict().items()})
    assert all(torch.equal(value, kept[1][name]) for name, value in kept[0].items())


def test_the_task_loss_is_that_of_the_labelled_half(folder: Path, tmp_path: Path) -> None:
    """With a teacher too: what the others show, and what is chosen as their boxes, is not part of it."""
    made = train(load(folder, **others(folder)), "fcos", teacher_of("fcos"), tmp_path, [MAPS, PSEUDO])
    model = made.distiller.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # statistics of a batch are of all its images
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    inputs = {"pixel_values": batch["pixel_values"], "labels": batch["labels"]}
    task = model(**inputs, teachers=made.source(batch)).parts["task"]
    alone = model(inputs["pixel_values"][:2], labels=inputs["labels"][:2]).parts["task"]
    torch.testing.assert_close(task, alone)


@pytest.mark.slow
def test_thresholds_go_on_after_a_break(folder: Path, tmp_path: Path) -> None:
    teacher, settings = teacher_of("fcos"), {"max_steps": 4, "logging_steps": 4}
    whole = train(load(folder, **others(folder)), "fcos", teacher, tmp_path / "whole", [PSEUDO], **settings)
    saving = {**settings, "save_strategy": "steps", "save_steps": 2}
    train(load(folder, **others(folder)), "fcos", teacher, tmp_path / "cut", [PSEUDO], **saving)
    task, sets = load(folder, **others(folder))
    again = CanKDTrainer(
        DetectionTask(task.id2label).build_student(student_of("fcos")),
        teacher,
        CanKDConfig(str(tmp_path / "cut"), **{**GIVEN, **saving}),
        terms=[PSEUDO],
        task=DetectionTask(task.id2label),
        train_dataset=with_unlabelled(sets.train, sets.unlabelled, 1.0),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, value in whole.distiller.state_dict().items():
        assert torch.equal(value, again.distiller.state_dict()[name]), name
    assert again.distiller.losses["pseudo_boxes"][0].images.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("student", "teacher", "terms", "said"),
    [
        ("faster_rcnn", "fcos", [PSEUDO], "got the head faster_rcnn"),
        ("fcos", "faster_rcnn", [PSEUDO], "there are none from teacher"),
        ("fcos", "fcos", [PSEUDO, LossTerm(loss="pseudo_boxes", name="more")], "expected one term pseudo_boxes"),
        ("fcos", "fcos", [LossTerm(loss="pseudo_boxes", options={"shar": 1})], "shar"),
    ],
)
def test_what_cannot_be_is_said(
    student: str, teacher: str, terms: list[LossTerm], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        train(load(folder, **others(folder)), student, teacher_of(teacher), tmp_path, terms)


@pytest.mark.slow
def test_maps_alone_teach_faster_rcnn_with_unlabelled_images(folder: Path, tmp_path: Path) -> None:
    made = train(load(folder, **others(folder)), "faster_rcnn", teacher_of("faster_rcnn"), tmp_path, [MAPS])
    assert all(math.isfinite(entry["loss"]) for entry in made.state.log_history if "loss_task" in entry)


@pytest.mark.parametrize(
    ("student", "teacher"), [("fcos", "fcos"), pytest.param("rt_detr", "detr", marks=pytest.mark.slow)]
)
def test_cutmix_and_all_terms_together(student: str, teacher: str, folder: Path, tmp_path: Path) -> None:
    """Dense predictions, queries and boxes follow the pictures."""
    strong = StrongConfig(images="all", cutmix=1.0)
    logits = LossTerm(loss="dense_logits" if student == "fcos" else "pseudo_boxes", weight=1.0)
    terms = [MAPS, PSEUDO] if student != "fcos" else [MAPS, PSEUDO, logits]
    made = train(load(folder, **others(folder), strong=strong), student, teacher_of(teacher), tmp_path, terms)
    logged = [entry for entry in made.state.log_history if "loss_task" in entry]
    assert len(logged) == 2 and all(math.isfinite(value) for entry in logged for value in entry.values())
    batch = next(iter(made.get_train_dataloader()))
    assert (batch.meta["mix"][:, 0] >= 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", "conditional_detr"])
def test_two_processes_equal_one_with_the_double_batch(kind: str, two: Path, tmp_path: Path) -> None:
    single = taught_trainer(tmp_path, kind, per_device_train_batch_size=8)
    start = weights(single)
    single.train()
    ranks = [load_file(two / f"{kind}{rank}.safetensors") for rank in range(2)]
    assert largest_difference(ranks[0], ranks[1]) == 0
    assert largest_difference(start, ranks[0]) > 1e-3, "nothing moved: the test would prove nothing"
    assert single.distiller.losses["pseudo_boxes"][0].chosen.sum() > 0
    assert largest_difference(weights(single), ranks[0]) < 1e-6


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left their weights."""
    folder = tmp_path_factory.mktemp("two")
    run_two(Path(__file__).with_name("two_processes_boxes.py"), folder)
    return folder


def test_boxes_need_the_students_own_loss(folder: Path, tmp_path: Path) -> None:
    task, sets = load(folder, **others(folder))
    made = CanKDTrainer(
        DetectionTask(task.id2label).build_student(student_of("fcos")),
        teacher_of("fcos"),
        CanKDConfig(str(tmp_path), **GIVEN),
        terms=[PSEUDO],
        train_dataset=with_unlabelled(sets.train, sets.unlabelled, 1.0),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.dense["boxes"].sum(),
    )
    with pytest.raises(InputError, match="leave compute_loss_func out"):
        made.train()
