"""What a training spent: without its evaluations, with its processes, and as if it had never been interrupted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cankd_hf.errors import InputError
from cankd_hf.training.monitoring import cost
from cankd_hf.training.monitoring.cost import CostMeter, cpu_seconds

from .tiny_trainers import Images, trainer

BURN = "import time\nwhile time.process_time() < 0.4: pass\nprint('done', flush=True)\ninput()"


def test_processes_count_while_they_run_and_after() -> None:
    before = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline().strip() == b"done"
        running = cpu_seconds() - before
        child.communicate(b"\n")
    ended = cpu_seconds() - before
    assert running > 0.35 and ended >= running - 0.02 and ended < running + 1.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only moves when it is told to, of the CPU and on the wall."""
    now = [100.0]
    monkeypatch.setattr(cost, "cpu_seconds", lambda: now[0])
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


class Slow(Images):
    """Reading an image takes so many seconds of the clock."""

    def __init__(self, count: int, clock: list[float], seconds: float) -> None:
        super().__init__(count)
        self.clock, self.seconds = clock, seconds

    def __getitem__(self, index: int) -> Any:
        self.clock[0] += self.seconds
        return super().__getitem__(index)


def test_steps_count_and_evaluations_do_not_also_after_a_resume(tmp_path: Path, clock: list[float]) -> None:
    def made(folder: str, steps: int, meter: CostMeter) -> Any:
        settings: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1}
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
        one = trainer(tmp_path / folder, Slow(12, clock, 1.0), eval_dataset=Slow(4, clock, 50.0), **settings)
        one.add_callback(meter)
        return one

    meter = CostMeter()
    clock[0] += 7.0  # the models are made
    one = made("whole", 6, meter)
    clock[0] += 2.0
    started = clock[0] - 100.0
    one.train()
    spent = meter.cost
    assert spent["cpu_seconds"] == spent["wall_seconds"] == pytest.approx(started + 24.0)
    assert spent["cpu_seconds_to_first_step"] == pytest.approx(started + 4.0, abs=8.0)
    assert clock[0] >= 100 + started + 24 + 3 * 200  # and the evaluations took much longer
    curve = [entry for entry in one.state.log_history if "eval_loss" in entry]
    assert [entry["train_cpu_seconds"] - started for entry in curve] == pytest.approx([8.0, 16.0, 24.0], abs=8.0)

    again = CostMeter()
    clock[0] += 1000.0  # another process: what it costs to come back is not the training's
    resumed = made("whole", 6, again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.cost["cpu_seconds"] == pytest.approx(spent["cpu_seconds"], abs=8.0)
    assert again.cost["cpu_seconds_to_first_step"] == spent["cpu_seconds_to_first_step"]


def test_what_was_spent_before_is_charged_in_full_also_after_a_resume(tmp_path: Path, clock: list[float]) -> None:
    def made(meter: CostMeter) -> Any:
        settings: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1}
        one = trainer(tmp_path, Slow(12, clock, 1.0), save_steps=2, save_strategy="steps", **settings)
        one.add_callback(meter)
        return one

    meter = CostMeter()
    meter.prepay("teacher cache", {"cpu_seconds": 300.0, "device_seconds": 100.0, "gpu": 1})
    meter.prepay("pseudo-labels", 20)
    meter.prepay("pseudo-labels", 30)  # told again: charged once
    one = made(meter)
    one.train()
    spent = meter.cost
    assert meter.prepaid["teacher cache"] == {"cpu_seconds": 300.0, "device_seconds": 100.0}
    assert (spent["cpu_seconds_prepaid"], spent["wall_seconds_prepaid"]) == (330.0, 130.0)
    assert 16 <= spent["cpu_seconds"] - 330 == spent["wall_seconds"] - 130 < 60
    assert 330 < spent["cpu_seconds_to_first_step"] < spent["cpu_seconds"]
    assert one.state.log_history[-1]["train_cpu_seconds"] == spent["cpu_seconds"]

    again = CostMeter()
    again.prepay("teacher cache", {"cpu_seconds": 400.0, "wall_seconds": 100.0})  # since then it grew
    again.prepay("pseudo-labels", 30.0)
    made(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.cost["cpu_seconds"] == pytest.approx(spent["cpu_seconds"] + 100, abs=8.0)
    assert again.cost["cpu_seconds_to_first_step"] == spent["cpu_seconds_to_first_step"] + 100


@pytest.mark.parametrize("seconds", [{}, {"hours": 3.0}, -1.0, float("nan"), {"cpu_seconds": "3"}])
def test_seconds_that_are_none_are_told(seconds: Any) -> None:
    with pytest.raises(InputError, match="cost of teacher cache: expected seconds of at least 0"):
        CostMeter().prepay("teacher cache", seconds)
