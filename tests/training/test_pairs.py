"""Any teacher to any student: one step each, whatever the shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, set_seed

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.models import register
from cankd_hf.models.students import StudentConfig, build_student
from cankd_hf.teachers.load import load_teacher

from .tiny_trainers import CLASSES, Images, terms, trainer, weights

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "intermediate_size": 64}
STAGES = {"depths": [1, 1, 1, 1], "out_indices": [1, 2, 3, 4]}
TEACHERS: dict[str, dict[str, Any]] = {
    "dinov2": {"model_type": "dinov2", **{k: v for k, v in VIT.items() if k != "intermediate_size"}, "patch_size": 14},
    "dinov2 with registers": {
        "model_type": "dinov2_with_registers",
        **{k: v for k, v in VIT.items() if k != "intermediate_size"},
        "patch_size": 14,
        "num_register_tokens": 2,
    },
    "vit": {"model_type": "vit", **VIT, "patch_size": 16, "image_size": 64},
    "swin": {"model_type": "swin", "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2, **STAGES},
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 24], **STAGES},
    "resnet": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 40], **STAGES},
}
PYRAMID = {"fpn_channels": 16, "head_channels": 16}
STUDENTS: dict[str, StudentConfig] = {
    "resnet": StudentConfig(backbone={**TEACHERS["resnet"], "hidden_sizes": [8, 8, 16, 16]}, fpn=PYRAMID),
    "convnext": StudentConfig(backbone=TEACHERS["convnext"], fpn=PYRAMID),
    "timm mobilenetv3": StudentConfig(
        backbone={"model_type": "timm_backbone", "backbone": "mobilenetv3_small_050", "out_indices": [1, 2, 3, 4]},
        fpn=PYRAMID,
    ),
    "segformer": StudentConfig(
        config={
            "model_type": "segformer",
            "hidden_sizes": [8, 8, 16, 16],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        }
    ),
}


# Each of them once by default, all with all the others in `-m slow`.
PAIRS = [
    pytest.param(teacher, student, marks=[] if teacher == "dinov2" or student == "resnet" else pytest.mark.slow)
    for teacher in TEACHERS
    for student in STUDENTS
]


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
def test_one_step(tmp_path: Path, teacher_name: str, student_name: str) -> None:
    register()
    set_seed(0)
    names = {index: str(index) for index in range(CLASSES)}
    student = build_student(STUDENTS[student_name], AutoModelForSemanticSegmentation, names)
    teacher = load_teacher(TeacherConfig(config=TEACHERS[teacher_name]))
    # 96 is no multiple of 14, and neither is 80: the teacher's grid never is the student's.
    made = trainer(tmp_path, Images(4, size=96), model=student, teacher=teacher, terms=terms(), max_steps=1)
    start = weights(made)
    made.train()
    moved = weights(made)
    assert made.state.log_history[0]["loss_cankd"] > 0
    for part in ("student.", "connectors.", "losses."):
        if not any(name.startswith(part) for name in start):
            continue  # no connector where the channels agree
        assert any(not torch.equal(start[name], moved[name]) for name in start if name.startswith(part)), part
    assert all(value.isfinite().all() for value in moved.values() if value.is_floating_point())


@pytest.mark.parametrize("size", [(224, 224), (448, 672)])
def test_patch_14_against_strides_8_to_32(tmp_path: Path, size: tuple[int, int]) -> None:
    teacher = load_teacher(TeacherConfig(config=TEACHERS["dinov2"]))
    levels = teacher.levels(size)
    assert [level.size for level in levels] == [(size[0] // 14, size[1] // 14)]
    names = {index: str(index) for index in range(CLASSES)}
    config = StudentConfig(backbone=STUDENTS["resnet"].backbone, fpn={**PYRAMID, "strides": [8, 16, 32]})
    student = build_student(config, AutoModelForSemanticSegmentation, names)
    images = [{"pixel_values": torch.randn(3, *size), "labels": torch.zeros(size, dtype=torch.int64)}] * 2
    made = trainer(tmp_path, images, model=student, teacher=teacher, terms=terms(), max_steps=1)
    made.train()
    assert [level.stride for level in made.distiller.levels] == [8, 16, 32]
    assert [item.pair for item in made.distiller.placed] == [(1, 0), (2, 0)]
