"""DINO in the trainer: as student and as teacher, resumed, in two processes, and until it knows its images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.models.dino.modeling_cankd_dino import DINOForObjectDetection
from cankd_hf.tasks import DetectionTask, TaskData
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.trainer import CanKDTrainer
from tests.processes import run_two

from .detection_folders import write_boxes
from .detector_trainers import detector_trainer
from .native_detector_configs import PYRAMID, RESNET, config
from .tiny_trainers import largest_difference, weights

FCOS = {"model_type": "cankd_fpn", "backbone_config": RESNET, "head": "fcos", "head_layers": 1, "fpn_channels": 16}
Data = tuple[DetectionTask, TaskData]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = write_boxes(tmp_path_factory.mktemp("dino") / "boxes", 4, 8)
    return DetectionTask.from_data(DataConfig(path=str(folder), image_size=[60, 90], scale=[0.8, 1.2]))


def trainer(
    data: Data, student: StudentConfig, teacher: Any, folder: Path, terms: Any = None, **settings: Any
) -> CanKDTrainer:
    set_seed(0)
    given: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    given |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    task = DetectionTask(data[0].id2label)
    model = task.build_student(student)
    return CanKDTrainer(
        model,
        None if teacher is None else load_teacher(TeacherConfig(**teacher)),
        CanKDConfig(str(folder), **{**given, **settings}),
        task=task,
        terms=terms,
        train_dataset=data[1].train,
        eval_dataset=data[1].eval,
        processing_class=task.for_model(model).image_processor(DataConfig(image_size=[60, 90])),
    )


def test_it_learns_from_another_detector(data: Data, tmp_path: Path) -> None:
    made = trainer(data, StudentConfig(config=config("cankd_dino")), {"config": FCOS}, tmp_path)
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    made.train()
    logged = made.state.log_history[0]
    assert logged["loss_cankd"] > 0 and logged["loss_task"] > 0 and math.isfinite(logged["loss"])
    assert math.isfinite(made.evaluate()["eval_ap"])
    after = made.student.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    for part in ("backbone", "input_proj", "encoder", "decoder", "label_embed", "class_embed", "encoder_bbox_embed"):
        assert any(part in name for name in moved), part
    assert [round(level.stride) for level in made.distiller.taps.levels((128, 128))] == [8, 16, 32, 64]
    made.save_model(str(tmp_path / "saved"))

    # As a teacher: of a pyramid by its maps, of another DINO also by its queries.
    taught = trainer(
        data,
        StudentConfig(backbone=RESNET, fpn={key: FCOS[key] for key in ("head", "head_layers", "fpn_channels")}),
        {"model": str(tmp_path / "saved")},
        tmp_path,
    )
    taught.train()
    assert taught.state.log_history[0]["loss_cankd"] > 0
    terms = [LossTerm(loss="cankd", pairs=[[0, 0], [1, 1], [2, 2]]), LossTerm(loss="query_logits")]
    again = trainer(
        data,
        StudentConfig(config=config("cankd_dino"), taps=["model.input_proj.*"]),
        {"model": str(tmp_path / "saved"), "taps": ["model.input_proj.*"]},
        tmp_path,
        terms=terms,
    )
    again.train()
    logged = again.state.log_history[0]
    assert logged["loss_cankd"] > 0 and logged["loss_query_logits"] > 0


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_noise(data: Data, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    student = StudentConfig(config=config("cankd_dino"))
    whole = trainer(data, student, None, tmp_path / "whole", **settings)
    whole.train()
    second = trainer(data, student, None, tmp_path / "whole", **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Without denoising, whose groups depend on the fullest image of a process, and whose noise is random."""
    made = detector_trainer(tmp_path, "dino")
    made.train()
    run_two(Path(__file__).with_name("two_processes_dino.py"), tmp_path)
    parts = [load_file(tmp_path / f"dino{rank}.safetensors") for rank in (0, 1)]
    assert largest_difference(*parts) == 0
    assert largest_difference(weights(made), parts[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_learns_eight_images_by_heart(data: Data, tmp_path: Path) -> None:
    fields = config("cankd_dino")
    fields |= {"d_model": 64, "num_queries": 30, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_denoising": 20}
    fields["backbone_config"] = {**PYRAMID, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64]}
    images = data[1].eval
    made = trainer(
        (data[0], TaskData(images, images, None)),
        StudentConfig(config=fields),
        None,
        tmp_path,
        max_steps=400,
        learning_rate=1e-3,
        warmup_steps=0.1,
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        logging_steps=100,
    )
    assert isinstance(made.student, DINOForObjectDetection)
    made.train()
    scores = made.evaluate()
    print({key: round(value, 3) for key, value in scores.items() if key.startswith("eval_ap")})
    assert scores["eval_ap50"] >= 0.9
