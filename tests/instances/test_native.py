"""Every native family of transformers as a student and a teacher of instance segmentation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import pipeline, set_seed
from transformers.backbone_utils import BackboneMixin

from cankd_hf import CanKDConfig, CanKDTrainer
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.sources import TaskData
from cankd_hf.errors import InputError
from cankd_hf.models.backbones import random_backbone
from cankd_hf.models.native_masks import NATIVE, UNIVERSAL, auto_class
from cankd_hf.tasks import InstanceSegmentationTask, saved_task, task_for
from cankd_hf.tasks.native_instances import PROCESSORS
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher
from tests.instances.folders import write_instances
from tests.instances.native_configs import FAMILIES, SIZE, STAGES, config
from tests.instances.native_trainers import one_step
from tests.processes import run_two
from tests.training.native_detector_configs import RESNET

SLOW = {"eomt_dinov3"}  # almost the code of another
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NATIVE]
)
DATA: dict[str, Any] = {"image_size": [60, 90], "scale": [0.8, 1.2]}  # padded batches
FIXED: dict[str, Any] = {"image_size": [SIZE, SIZE], "crop_size": [SIZE, SIZE], "keep_aspect": True}


@dataclass
class Run:
    """One family after one step of distillation, and its scores, saved."""

    trainer: CanKDTrainer
    before: dict[str, Tensor]
    scores: dict[str, float]
    folder: Path


def settings_of(name: str) -> dict[str, Any]:
    return FIXED if name.startswith("eomt") else DATA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def images(folder: Path) -> str:
    return str(write_instances(folder / "images"))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    set_seed(1)
    fields = {"model_type": "cankd_fpn", "backbone_config": RESNET, "head": "fcos", "head_layers": 1}
    return load_teacher(TeacherConfig(config={**fields, "fpn_channels": 16}))


def read(images: str, name: str) -> tuple[InstanceSegmentationTask, TaskData]:
    task, data = InstanceSegmentationTask.from_data(DataConfig(path=images, **settings_of(name)))
    assert isinstance(task, InstanceSegmentationTask)
    return task, data


@pytest.fixture(scope="module")
def run(folder: Path, images: str, teacher: Teacher) -> Callable[[str], Run]:
    """The run of a family, made when first asked for."""
    runs: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in runs:
            task, sets = read(images, name)
            set_seed(0)
            student = task.build_student(StudentConfig(config=config(name)))
            before = {key: value.clone() for key, value in student.state_dict().items()}
            args: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
            args |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
            trainer = CanKDTrainer(
                student,
                teacher,
                CanKDConfig(str(folder / name), **args),
                task=task,
                train_dataset=sets.train,
                eval_dataset=sets.eval,
                processing_class=task.for_model(student).image_processor(DataConfig(path=images, **settings_of(name))),
            )
            trainer.train()
            scores = trainer.evaluate()
            trainer.save_model(str(folder / name))
            runs[name] = Run(trainer, before, scores, folder / name)
        return runs[name]

    return get


@EACH
def test_one_step_then_scores(name: str, run: Callable[[str], Run]) -> None:
    made = run(name)
    logged = made.trainer.state.log_history[0]
    assert logged["loss_cankd"] > 0 and logged["loss_task"] > 0 and math.isfinite(logged["loss"])
    assert all(math.isfinite(made.scores[f"eval_{key}"]) for key in ("mask_ap", "mask_ap50", "ap", "loss"))
    after = made.trainer.student.state_dict()
    moved = [key for key, value in made.before.items() if not torch.equal(value, after[key])]
    assert any(after[key].ndim == 4 for key in moved) and any("mask" in key or "query" in key for key in moved)
    levels = made.trainer.distiller.taps.levels((128, 128))
    assert [round(level.stride) for level in levels] == FAMILIES[name][1]


@EACH
def test_no_answer_that_is_not_finite_is_scored(name: str, run: Callable[[str], Run]) -> None:
    made = run(name)
    own = (
        ("class_queries_logits", "masks_queries_logits")
        if name in UNIVERSAL
        else ("logits", "pred_boxes", "pred_masks")
    )
    for answer in own:

        def spoil(module: Any, args: Any, kwargs: Any, outputs: Any, answer: str = answer) -> None:
            outputs[answer].view(-1)[0] = math.nan

        handle = made.trainer.student.register_forward_hook(spoil, with_kwargs=True)
        try:
            with pytest.raises(
                InputError, match="expected finite outputs to score, got NaN or infinity for 1 of 2 images"
            ):
                made.trainer.evaluate()
        finally:
            handle.remove()


@EACH
def test_saved_it_is_a_student_a_teacher_and_stock(name: str, run: Callable[[str], Run]) -> None:
    made = run(name)
    task = saved_task(str(made.folder))
    assert task is InstanceSegmentationTask
    own = made.trainer.student.state_dict()
    loaded, stock = task.load(made.folder), auto_class(name).from_pretrained(made.folder)
    for model in (loaded, stock):
        assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    # a task of the user's, and a model that transformers made
    made.trainer.task.for_model(stock)
    batch = next(iter(made.trainer.get_eval_dataloader()))
    assert stock(**made.trainer.task.model_inputs(batch)).loss.isfinite()
    assert isinstance(task_for(stock), InstanceSegmentationTask)
    teacher = load_teacher(str(made.folder))
    size = (SIZE, SIZE) if name.startswith("eomt") else (128, 128)
    maps, levels = teacher(torch.randn(2, 3, *size)), teacher.levels(size)
    assert [(m.shape[1], tuple(m.shape[2:])) for m in maps] == [(level.channels, level.size) for level in levels]
    assert [round(level.stride) for level in levels] == FAMILIES[name][1]


@EACH
def test_the_code_of_its_card_runs(
    name: str, run: Callable[[str], Run], images: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run(name)
    processor = transformers.AutoImageProcessor.from_pretrained(made.folder)
    assert type(processor) is PROCESSORS[name]
    code, _ = InstanceSegmentationTask.usage(made.trainer.student.config.to_dict(), str(made.folder))
    # an untrained student is sure of nothing
    code = code.replace("photo.jpg", f"{images}/val/0.png").replace("threshold=0.5", "threshold=0.0")
    exec(code, {"pipeline": pipeline})
    assert name == "detr" or "(96, 64)" in capsys.readouterr().out  # it may see nothing but "no object"


@pytest.mark.parametrize("name", ["mask2former", "maskformer", "detr"])
def test_its_backbone_is_pretrained_and_learns_at_its_own_rate(
    name: str, run: Callable[[str], Run], tmp_path: Path
) -> None:
    set_seed(3)
    wanted = random_backbone(STAGES)
    wanted.save_pretrained(tmp_path)
    given = {"pretrained": str(tmp_path), "out_indices": [1, 2, 3, 4]}
    student = InstanceSegmentationTask({0: "a"}).build_student(
        StudentConfig(config={**config(name), "backbone_config": given})
    )
    (inside,) = [part for part in student.modules() if isinstance(part, BackboneMixin)]
    assert all(torch.equal(value, inside.state_dict()[key]) for key, value in wanted.named_parameters())
    trainer = run(name).trainer
    (inside,) = [part for part in trainer.student.modules() if isinstance(part, BackboneMixin)]
    trainer.optimizer, trainer.args.backbone_lr_scale = None, 0.1
    try:
        groups = trainer.create_optimizer().param_groups
    finally:
        trainer.args.backbone_lr_scale = 1.0
    slow = {id(p) for group in groups for p in group["params"] if group["lr"] < trainer.args.learning_rate / 2}
    assert slow == {id(p) for p in inside.parameters() if p.requires_grad}


def answers(name: str, labels: list[dict[str, Tensor]], size: tuple[int, int]) -> dict[str, Tensor]:
    """What a model that knows the objects would say, with some queries to spare."""
    masks = torch.full((len(labels), 12, *size), -9.0)
    classes, boxes = torch.full((len(labels), 12), 3), torch.rand(len(labels), 12, 4)
    for row, label in enumerate(labels):
        single = label["iscrowd"] == 0
        places = torch.randperm(12)[: int(single.sum())]
        masks[row, places] = torch.where(label["masks"][single], 9.0, -9.0)
        classes[row, places], boxes[row, places] = label["class_labels"][single], label["boxes"][single]
    logits = torch.nn.functional.one_hot(classes, 4) * 20.0
    if name in UNIVERSAL:
        return {"class_queries_logits": logits, "masks_queries_logits": masks}
    sigmoid = {"logits": logits[..., :3] - 10, "pred_boxes": boxes, "pred_masks": masks}
    return sigmoid if name == "rf_detr" else {**sigmoid, "logits": logits}


@pytest.mark.parametrize("name", [name for name in NATIVE if name not in SLOW])
def test_perfect_answers_score_one(name: str, folder: Path, images: str) -> None:
    """Images of two sizes, one of them padded, with a crowd and without an object."""
    samples: list[dict[str, Any]] = []
    other = folder / f"other_{name}"
    for place, size in ((images, [64, 96]), (str(write_instances(other, size=(48, 64))), [48, 64])):
        settings = {"image_size": size, "keep_aspect": True}
        task, sets = InstanceSegmentationTask.from_data(DataConfig(path=place, **settings))
        samples += [sets.eval[number] for number in range(len(sets.eval))]
    batch = task.collate(samples)
    size = (batch["pixel_values"].shape[-2], batch["pixel_values"].shape[-1])
    assert size == (64, 96) and len({tuple(label["size"].tolist()) for label in batch["labels"]}) == 2
    student = task.build_student(StudentConfig(config=config(name)))
    found = task.statistics({"outputs": answers(name, batch["labels"], size)}, batch, student)
    scores = task.scores({key: value.numpy() for key, value in found.items()})
    assert scores["mask_ap"] == pytest.approx(1) and scores["ap50"] == pytest.approx(1)
    assert name in UNIVERSAL or scores["ap"] == pytest.approx(1)  # boxes around masks are of whole pixels


def test_images_that_a_family_does_not_take_are_refused(images: str) -> None:
    task, sets = InstanceSegmentationTask.from_data(DataConfig(path=images, image_size=[64, 96]))
    student = task.build_student(StudentConfig(config=config("eomt")))
    with pytest.raises(InputError, match=r"data\.image_size: eomt takes images of 64 x 64 alone, got .* 64 x 128"):
        task.for_model(student).collate([sets.eval[0]])
    assert task.why_not_scored(student) == "it takes images of 64 x 64 alone"
    assert task.for_model(student).why_not_scored(student) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "oneformer"}, "oneformer cannot be trained here, because its loss reads a text"),
        (
            {**config("detr"), "backbone_config": {**RESNET, "out_features": ["stage4"]}},
            "detr makes masks of the maps of at least 3 stages, got 1",
        ),
        ({"model_type": "conditional_detr"}, "expected a model type that AutoModelForUniversalSegmentation knows"),
    ],
)
def test_students_that_cannot_be_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        InstanceSegmentationTask({0: "a", 1: "b"}).build_student(StudentConfig(config=fields))


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(tmp_path: Path) -> None:
    """As far as random points, and the mean of classes over the queries of a process, allow."""
    names = ("mask2former", "maskformer", "detr", "rf_detr")
    run_two(Path(__file__).with_name("two_processes_native.py"), tmp_path, *names)
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2))
    for name in names:
        alone = one_step(tmp_path / f"one_{name}", name, batch=4).state.log_history[0]["loss_task"]
        assert first[name][0] == pytest.approx(alone, rel=0.1)
        assert first[name] == pytest.approx(second[name]), "both hold the same weights"


@pytest.mark.slow
def test_mask2former_learns_images_by_heart(tmp_path: Path) -> None:
    """Eight generated images, through the task."""
    settings = DataConfig(path="shapes", generated={"train": 8, "validation": 8, "size": 96})
    task, sets = InstanceSegmentationTask.from_data(settings)
    backbone = {**STAGES, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64]}
    fields = {**config("mask2former"), "backbone_config": backbone, "num_queries": 20, "train_num_points": 512}
    fields |= dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 64) | {"dropout": 0.0}
    fields |= {"encoder_feedforward_dim": 128, "dim_feedforward": 128, "num_attention_heads": 4}
    set_seed(0)
    student = task.build_student(StudentConfig(config=fields))
    args: dict[str, Any] = {"max_steps": 400, "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "disable_tqdm": True}
    args |= {"per_device_train_batch_size": 8, "max_grad_norm": 1.0, "save_strategy": "no", "report_to": "none"}
    trainer = CanKDTrainer(
        student,
        None,
        CanKDConfig(str(tmp_path), learning_rate=1.5e-3, use_cpu=True, **args),
        task=task,
        train_dataset=sets.eval,
        eval_dataset=sets.eval,
    )
    trainer.train()
    scores = trainer.evaluate()
    assert scores["eval_mask_ap50"] >= 0.9 and scores["eval_ap50"] >= 0.9
