"""Several students in one process: each as if it were alone, with one pass of the teacher for all."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cankd_hf.config.recipe import Recipe
from cankd_hf.errors import InputError
from cankd_hf.runs import page
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.runs.run import Stopped, run
from cankd_hf.runs.students import run_all
from cankd_hf.tasks import TASKS
from cankd_hf.teachers.source import LiveTeachers
from cankd_hf.training.monitoring.cost import CostMeter
from tests.training.tiny_trainers import dinov2

BACKBONE = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "drop_path_rate": 0.3}
PYRAMID = {"fpn_channels": 16, "head_channels": 16, "dropout": 0.3}


def recipe(folder: Path, *overrides: str) -> Recipe:
    content: dict[str, Any] = {
        "output_dir": str(folder),
        "data": {"path": "shapes", "generated": {"train": 16, "validation": 4, "test": 4, "size": 64}},
        "students": {
            "a": {"backbone": BACKBONE, "fpn": PYRAMID},
            "b": {"backbone": {**BACKBONE, "hidden_sizes": [8, 16, 16, 24]}, "fpn": {**PYRAMID, "norm": "batch"}},
        },
        "teacher": {"config": dinov2(), "every": 2},
        "distill": {"terms": [{"loss": "cankd", "conditioning": "layer"}]},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_steps": 2}
        | {"gradient_accumulation_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
        | {"measure_similarity": True, "disable_tqdm": True, "ema": 0.8},
    }
    return parse_recipe(json.dumps(content), overrides)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "ema" / "model.safetensors")}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the drawing: the others still train while one is drawn."""
    monkeypatch.setattr(TASKS["segmentation"], "picture", lambda *args: None)
    monkeypatch.setattr(page, "write_page", lambda *args: None)


class Passes:
    """Counts the passes of live teachers in training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        ask = LiveTeachers.__call__

        def counting(source: Any, batch: Any, names: Any = None) -> Any:
            self.count += torch.is_grad_enabled()
            return ask(source, batch, names)

        monkeypatch.setattr(LiveTeachers, "__call__", counting)


def test_together_they_end_with_the_weights_of_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    passes = Passes(monkeypatch)
    together = recipe(tmp_path / "together")
    reports = run_all(together)
    shared, passes.count = passes.count, 0
    assert "a: student distilled, 3 steps" in caplog.text
    assert [Path(report.output_dir).name for report in reports] == ["a", "b"]
    for name in ("a", "b"):
        single = replace(together.of_student(name), output_dir=str(tmp_path / "single" / name))
        report = run(single)
        one, other = weights(tmp_path / "together" / name), weights(tmp_path / "single" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items()), name
        assert report.arms[-1].scores["miou"] == reports["ab".index(name)].arms[-1].scores["miou"]
    assert shared == 4 and passes.count == 8, "steps 0 and 2 of two batches each"


def test_a_pass_is_charged_in_full_to_each_and_a_turn_of_another_to_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(CostMeter, "clocks", lambda self: {"cpu_seconds": now[0], "wall_seconds": now[0]})
    ask = LiveTeachers.__call__

    def slow(source: Any, batch: Any, names: Any = None) -> Any:
        now[0] += 100.0 if torch.is_grad_enabled() else 0.0
        return ask(source, batch, names)

    monkeypatch.setattr(LiveTeachers, "__call__", slow)
    plain = ("distill.terms.0.conditioning=none", "teacher.every=1", "training.gradient_accumulation_steps=1")
    reports = run_all(
        recipe(tmp_path, *plain, "training.max_steps=2", "training.eval_strategy=no", "training.ema=null")
    )
    assert now[0] == 200.0
    assert [report.arms[-1].cost["cpu_seconds"] for report in reports] == [200.0, 200.0]


@pytest.mark.slow
def test_a_stop_saves_all_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path / "stopped")
    ask, calls = LiveTeachers.__call__, []

    def interrupting(source: Any, batch: Any, names: Any = None) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return ask(source, batch, names)

    with monkeypatch.context() as patched:
        patched.setattr(LiveTeachers, "__call__", interrupting)
        with pytest.raises(Stopped):
            run_all(made)
    assert all(list((tmp_path / "stopped" / name).glob("checkpoint-*")) for name in ("a", "b"))
    run_all(made)
    whole = recipe(tmp_path / "whole")
    run_all(whole)
    for name in ("a", "b"):
        one, other = weights(tmp_path / "stopped" / name), weights(tmp_path / "whole" / name)
        assert all(torch.equal(value, other[key]) for key, value in one.items()), name


@pytest.mark.slow
def test_one_that_fails_is_named_and_does_not_stop_the_other(tmp_path: Path) -> None:
    made = recipe(tmp_path, "students.a.taps=[nowhere]", "training.ema=null")
    with pytest.raises(InputError, match=r"students\.a: .*nowhere"):
        run_all(made)
    assert (tmp_path / "b" / "results.json").is_file()


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    for overrides, said in (
        (["teacher.fit={max_steps: 1}"], r"teacher\.fit .*: would fit a teacher for each of students"),
        (["teacher=null"], r"students .*: share the passes of a teacher, and there is none"),
        (["student.model=some/model"], r"students .*: expected student or students, got both"),
        (["training.push_to_hub=true"], r"students .*: would all be pushed to one repository"),
        (["students.a.fpn.width=3"], r"students\.a\.fpn\.width .*: unknown key"),
    ):
        with pytest.raises(InputError, match=said):
            recipe(tmp_path, *overrides)
    made = recipe(tmp_path)
    with pytest.raises(InputError, match="--resume: names the checkpoint of one student"):
        run_all(made, resume="x")
    with pytest.raises(InputError, match="students: each has a run of its own"):
        run(made)
