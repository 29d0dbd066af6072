"""Figures while training: they reach the trackers, and training does not notice."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import integrations

from cankd_hf import FeatureFiguresCallback, InputError, load_recipe
from cankd_hf.features.taps import Taps
from cankd_hf.figures import Subject, look
from cankd_hf.figures import callback as module
from cankd_hf.runs.build import build_trainer
from cankd_hf.tasks import TASKS

from . import tiny_trainers as tiny

NAMES = ["activation", "attention", "difference", "principal_components"]


def trained(folder: Path, figures: bool, **overrides: Any) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Two steps with dropout, so that one random number drawn too many shows; its weights and random state."""
    trainer = tiny.trainer(
        folder,
        data=tiny.Images(16, noisy=True),
        model=tiny.student(dropout=0.3),
        eval_dataset=tiny.Images(4, noisy=True),
        eval_strategy="steps",
        eval_steps=1,
        **{"terms": tiny.terms(), **overrides},
    )
    if figures:
        trainer.add_callback(FeatureFiguresCallback(trainer, steps=1, images=1))
    torch.manual_seed(5)
    trainer.train()
    return trainer, tiny.weights(trainer), torch.get_rng_state()


def test_tensorboard_gets_the_figures_and_training_is_as_without(tmp_path: Path) -> None:
    with_figures, weights, state = trained(tmp_path / "with", True, report_to="tensorboard")
    modes = {name: child.training for name, child in with_figures.distiller.named_modules()}
    without, expected, expected_state = trained(tmp_path / "without", False, report_to="none")
    assert tiny.largest_difference(weights, expected) == 0
    assert torch.equal(state, expected_state)
    assert modes == {name: child.training for name, child in without.distiller.named_modules()}
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == [f"features/{name}/0" for name in NAMES]
    first = events.Images("features/activation/0")
    assert [image.step for image in first] == [1, 2]
    assert first[0].encoded_image_string.startswith(b"\x89PNG") and first[0].width > 500


class Recorder(types.ModuleType):
    """As much of wandb or trackio as the Trainer's callbacks and ours call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.logged: list[dict[str, Any]] = []
        self.run: Any = types.SimpleNamespace(summary={}, _label=lambda **given: None)
        self.config: Any = types.SimpleNamespace(update=lambda *given, **more: None)
        self.__version__ = "1.0"

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    class Image:
        def __init__(self, picture: Any) -> None:
            self.pixels = np.asarray(picture)


@pytest.mark.parametrize(("name", "cls"), [("wandb", "WandbCallback"), ("trackio", "TrackioCallback")])
def test_other_trackers_get_them_too(name: str, cls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(name)
    monkeypatch.setitem(sys.modules, name, recorder)
    kind = getattr(integrations, cls)
    # The Trainer's own callback, without what it sets up before training.
    for method in ("__init__", "on_train_begin", "on_log", "on_train_end", "on_save"):
        monkeypatch.setattr(kind, method, lambda *given, **more: None)
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.Images(2), max_steps=1)
    trainer.add_callback(kind())
    trainer.add_callback(FeatureFiguresCallback(trainer, steps=1, images=1))
    trainer.train()
    (logged,) = recorder.logged
    assert logged.pop("train/global_step") == 1
    assert sorted(logged) == [f"features/{figure}/0" for figure in NAMES]
    assert all(image.pixels.ndim == 3 and image.pixels.std() > 5 for image in logged.values())


def test_a_figure_that_fails_costs_a_warning_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(seen: object) -> None:
        raise ZeroDivisionError("no such figure")

    monkeypatch.setitem(module.FIGURES, "activation", broken)
    with caplog.at_level(logging.WARNING):
        trainer, _, _ = trained(tmp_path, True, report_to="tensorboard")
    assert trainer.state.global_step == 2
    assert caplog.text.count("no figures are logged from here on: ZeroDivisionError") == 1


def test_without_a_validation_set_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.add_callback(FeatureFiguresCallback(trainer))
    trainer.train()
    assert "no validation set" in caplog.text


@pytest.mark.parametrize("steps", [0, 5])
def test_a_recipe_asks_for_them(steps: int, tmp_path: Path, repo_root: Path) -> None:
    changes = [f"training.log_figures_steps={steps}", "training.use_cpu=true", "data.generated={train: 4, test: 1}"]
    recipe = load_recipe(repo_root / "recipes" / "quickstart.yaml", changes)
    task, data = TASKS[recipe.task].from_data(recipe.data)
    trainer = build_trainer(recipe, task, data, tmp_path)
    own = [c for c in trainer.callback_handler.callbacks if isinstance(c, FeatureFiguresCallback)]
    assert [callback.steps for callback in own] == [5] * (steps > 0)


def test_a_negative_interval_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training.log_figures_steps: expected a number of steps"):
        tiny.trainer(tmp_path, log_figures_steps=-1)


def test_looking_leaves_modes_and_gradients_as_they_were() -> None:
    student = tiny.student(dropout=0.3).train()
    student.backbone.eval()  # a frozen part stays as it was put
    modes = [module.training for module in student.modules()]
    assert len(set(modes)) == 2
    taps = Taps(student)
    pixels = tiny.Images(1)[0]["pixel_values"]
    first, second = (look("x", pixels, np.zeros((64, 64, 3)), [Subject("s", taps)]) for _ in range(2))
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(first.students["s"], second.students["s"], strict=True))
    assert not any(found.requires_grad for found in first.students["s"])
