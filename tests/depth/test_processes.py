"""One process and two train the same weights and reach the same scores, of depth and of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm
from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.seeds import seeded
from cankd_hf.tasks import TASKS
from tests.processes import run_two

KINDS: dict[str, dict[str, Any]] = {
    "depth": {"fpn": {"fpn_channels": 8, "head_channels": 8, "norm": "group", "dropout": 0.0}},
    "classification": {"fpn": {"dropout": 0.0}},
}
SIZES = {"train": 8, "validation": 7, "test": 4, "size": 64}  # the last batch of an evaluation is filled up
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}  # without BatchNorm


def trained(kind: str, folder: Path, batch: int) -> tuple[CanKDTrainer, dict[str, float], list[float]]:
    """A trainer after two steps, its scores on all images, and a weight."""
    config = DataConfig(path="shapes", generated=SIZES, image_size=[64, 64], scale=[1.0, 1.0], flip=0.0)
    task, data = TASKS[kind].from_data(config)
    with seeded(0):
        student, teacher = (task.build_student(StudentConfig(backbone=CONVNEXT, **KINDS[kind])) for _ in range(2))
    args = CanKDConfig(
        str(folder),
        max_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    made = CanKDTrainer(
        student, teacher, args, terms=[LossTerm("cosine")], task=task, train_dataset=data.train, eval_dataset=data.eval
    )
    made.train()
    scores = made.evaluate()
    names = [name for name in scores if not name.endswith(("runtime", "per_second", "loss"))]
    weight = next(p for name, p in made.student.named_parameters() if name.endswith("weight"))
    return made, {name: scores[name] for name in names}, weight.detach().flatten()[:50].tolist()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_two(Path(__file__).with_name("two_processes.py"), tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for kind in KINDS:
        _, scores, weight = trained(kind, tmp_path / f"one_{kind}", batch=4)
        torch.testing.assert_close(torch.tensor(found[kind][1]), torch.tensor(weight), atol=1e-5, rtol=1e-4)
        assert found[kind][0] == pytest.approx(scores, rel=1e-3, abs=1e-3, nan_ok=True), kind
