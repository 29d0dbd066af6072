"""Is it working? Four seeded runs get their four verdicts, in Python and by recipe, and measuring changes nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetBackbone, ResNetConfig, set_seed

from cankd_hf import CanKDTrainer, LossTerm, Objective, train
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.monitoring.probe import cells, knn_accuracy
from cankd_hf.training.monitoring.working import BROKEN, LEARNING, PLATEAU, SHORTCUT, judge
from cankd_hf.training.streaming import IterableDataset

from .test_commands import RESNET, recipe
from .test_teacher_health import silenced
from .tiny_trainers import Images, largest_difference, student, teacher, trainer, weights

HELD = Images(8)
QUICK = {"max_steps": 40, "logging_steps": 40, "learning_rate": 0.3, "eval_dataset": HELD, "per_device_train_batch_size": 4}


def trained(seed: int = 1) -> Any:
    """A teacher whose norms are not those of new weights."""
    set_seed(seed)
    made = teacher(seed).model
    for name, value in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(value, 1.0 if name.endswith("weight") else 0.0, 0.1)
    return load_teacher(made)


def ran(folder: Path, **settings: Any) -> CanKDTrainer:
    made = trainer(folder, **{"teacher": trained(), **QUICK, **settings})
    made.train()
    return made


if __name__ == "__main__":
    import sys, tempfile, time
    logging.basicConfig(level=logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    term = [LossTerm(loss="cankd", weight=10.0)]
    for name, kw in {
        "learning": dict(terms=term, task_weight=0.0, optim="adamw_torch", learning_rate=3e-3),
        "mse": dict(terms=[LossTerm(loss="instance_mse")], task_weight=0.0, optim="adamw_torch", learning_rate=3e-3),
        "plateau": dict(terms=term, learning_rate=0.0),
        "shortcut": dict(objective=Objective(0.0, [LossTerm(loss="cankd", weight=10.0)], frozen=["backbone","neck","head"]), terms=None, optim="adamw_torch", learning_rate=1e-2),
        "random": dict(teacher=teacher()),
        "dead": dict(teacher=silenced("images")),
    }.items():
        t0 = time.process_time()
        try:
            made = ran(folder / name, **kw)
        except Exception as e:
            print(name, "FAILED", type(e), e); raise
        print(name, round(time.process_time() - t0, 2), made.working.verdict().line)
        print([{k: v for k, v in e.items() if k.startswith("held") or k == "step"} for e in made.state.log_history if "held_loss" in e])
