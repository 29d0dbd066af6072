"""Learning rates that drop at shares of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cankd_hf.errors import InputError
from cankd_hf.training.arguments import CanKDConfig

from .tiny_trainers import trainer


def test_the_rate_is_a_tenth_after_each_drop(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=6, lr_drops=[0.5, 0.8], learning_rate=0.1)
    made.train()
    rates = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001])
    warmed = trainer(tmp_path, max_steps=6, lr_drops=[0.5], learning_rate=0.1, warmup_steps=2)
    warmed.train()
    rates = [entry["learning_rate"] for entry in warmed.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.01, 0.01, 0.01])


def test_drops_survive_a_restart(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "lr_drops": [0.5], "learning_rate": 0.1}
    whole = trainer(tmp_path, **settings, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name


@pytest.mark.parametrize("drops", [[0.5, 0.2], [16.0, 22.0], [0.0]])
def test_drops_out_of_order_or_range_are_refused(drops: list[float], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.lr_drops: expected rising shares between 0 and 1"):
        CanKDConfig(str(tmp_path), use_cpu=True, lr_drops=drops)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_warm_up_alone_ends(steps: int, tmp_path: Path) -> None:
    """A polynomial decay of no steps divides by zero: `training.max_steps=1` of most recipes is one."""
    kwargs = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 0.9}, "warmup_steps": steps}
    made = trainer(tmp_path, max_steps=steps, learning_rate=0.1, **kwargs)
    made.train()
    rates = [entry["learning_rate"] for entry in made.state.log_history if "learning_rate" in entry]
    assert made.state.global_step == steps and rates == pytest.approx([0.1 * step / steps for step in range(steps)])
