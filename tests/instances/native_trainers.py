"""A step of each native family on generated objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cankd_hf import CanKDConfig, CanKDTrainer
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.seeds import seeded
from tests.instances.kinds import generated
from tests.instances.native_configs import config


def one_step(folder: Path, name: str, batch: int) -> CanKDTrainer:
    """Of four images in all processes together, without dropout and with many points in each mask."""
    task, data = generated()
    fields = config(name)
    where = fields.get("decoder_config", fields)
    where["dropout"] = 0.0
    if "train_num_points" in fields:
        fields["train_num_points"] = 4096
    with seeded(0):
        student = task.build_student(StudentConfig(config=fields))
    args: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    args |= {"per_device_train_batch_size": batch, "use_cpu": True, "disable_tqdm": True, "optim": "sgd"}
    made = CanKDTrainer(student, None, CanKDConfig(str(folder), **args), task=task, train_dataset=data.train)
    made.train()
    return made
