"""What trackers are sent: TensorBoard's file is read back; W&B and Trackio are fakes with the calls they get."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import transformers.integrations.integration_utils as integrations
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from cankd_hf.config.distill import LossTerm
from cankd_hf.training.monitoring.trackers import GroupedWandb, group_names, grouped
from cankd_hf.training.trainer import CanKDTrainer

from .tiny_trainers import Images, trainer

GROUPED_NAMES = {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/images_per_second",
    "train/data_wait",
    "loss/task",
    "loss/cankd",
    "similarity/correlation/",
    "similarity/cka/",
    "branch_share/cankd/",
    "eval/loss",
    "eval/miou",
    "test/miou",
}
HISTORY_NAMES = {"loss_task", "loss_cankd", "raw_correlation/", "raw_cka/", "branch_share/cankd/", "eval_miou"}


def trained(folder: Path, tracker: str, **overrides: Any) -> CanKDTrainer:
    """A trainer after two steps, a validation and a test."""
    made = trainer(
        folder,
        report_to=tracker,
        terms=[LossTerm()],
        eval_dataset=Images(4),
        eval_strategy="steps",
        eval_steps=2,
        **overrides,
    )
    made.train()
    made.evaluate(Images(4), metric_key_prefix="test")
    return made


def missing(wanted: set[str], names: set[str]) -> set[str]:
    return {name for name in wanted if not any(found == name or found.startswith(name) for found in names)}


def test_tensorboard_shows_groups_and_the_history_keeps_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    made = trained(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    names = set(board.Tags()["scalars"])
    assert not missing(GROUPED_NAMES, names), sorted(names)
    groups = {"train", "loss", "similarity", "branch_share", "gradient_share", "eval", "test"}
    assert {name.split("/")[0] for name in names} == groups
    assert "args/text_summary" in board.Tags()["tensors"], "transformers' own set-up is kept"
    history = made.state.log_history
    assert not missing(HISTORY_NAMES, {name for entry in history for name in entry})
    logged = [entry["loss_cankd"] for entry in history if "loss_cankd" in entry]
    curve = board.Scalars("loss/cankd")
    assert [point.step for point in curve] == [1, 2] and [point.value for point in curve] == pytest.approx(logged)


def test_names_of_levels_and_of_what_is_unknown() -> None:
    given = {"loss_cankd/s0t0": 1, "raw_cka/s1t1": 2, "branch_share/cankd/s0t0": 3, "validation_ap": 4, "epoch": 5}
    assert list(grouped({**given, "train_loss": 6, "loss": 7})) == [
        "loss/cankd/s0t0",
        "similarity/cka/s1t1",
        "branch_share/cankd/s0t0",
        "validation/ap",
        "train/epoch",
        "train/train_loss",
        "train/loss",
    ]


class FakeRun:
    """A run of a fake tracker: what it was sent, in order."""

    def __init__(self, name: str | None) -> None:
        self.id, self.name = "1", name
        self.sent: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.finished = False

    def _label(self, code: str) -> None:
        assert code == "transformers_trainer"


class FakeTracker(ModuleType):
    """The part of `wandb` and of `trackio` that their callbacks call."""

    def __init__(self) -> None:
        super().__init__("fake")
        self.run: FakeRun | None = None
        self.runs: list[FakeRun] = []
        self.config = FakeConfig()
        self.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))

    def init(self, name: str | None = None, **settings: Any) -> None:
        self.run = FakeRun(name)
        self.runs.append(self.run)

    def finish(self) -> None:
        assert self.run is not None
        self.run.finished, self.run = True, None

    def log(self, values: dict[str, Any]) -> None:
        assert self.run is not None
        self.run.sent.append(values)

    def define_metric(self, *names: str, **settings: Any) -> None:
        assert names in (("train/global_step",), ("*",))


class FakeConfig(dict):
    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:  # type: ignore[override]
        assert allow_val_change
        super().update(values)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    """Both packages, as far as transformers can tell; report_to takes them."""
    made = FakeTracker()
    errors = ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = KeyError  # type: ignore[attr-defined]
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, made)
        monkeypatch.setattr(integrations, f"is_{name}_available", lambda: True)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    monkeypatch.setattr(GroupedWandb, "_left", None)
    return made


def test_wandb_shows_groups_and_each_training_is_a_run(tmp_path: Path, fake: FakeTracker) -> None:
    made = trained(tmp_path / "a", "wandb", run_name="first")
    [run] = fake.runs
    assert any(isinstance(callback, WandbCallback) for callback in made.callback_handler.callbacks)
    assert not missing(GROUPED_NAMES, {name for values in run.sent for name in values})
    assert all("train/global_step" in values for values in run.sent)
    assert {"train_runtime", "train_loss"} <= run.summary.keys()
    assert not run.finished, "the test scores came into it, and more may come"
    trained(tmp_path / "b", "wandb", run_name="second")
    assert [run.name for run in fake.runs] == ["first", "second"] and fake.runs[0].finished
    assert any("test/miou" in values for values in fake.runs[1].sent)


def test_a_wandb_run_of_the_user_is_not_closed(tmp_path: Path, fake: FakeTracker) -> None:
    fake.init("mine")
    for name in ("a", "b"):
        trainer(tmp_path / name, report_to="wandb").train()
    assert [run.name for run in fake.runs] == ["mine"] and not fake.runs[0].finished


def test_trackio_shows_groups(tmp_path: Path, fake: FakeTracker) -> None:
    made = trained(tmp_path, "trackio", run_name="one")
    assert any(isinstance(callback, TrackioCallback) for callback in made.callback_handler.callbacks)
    assert not missing(GROUPED_NAMES, {name for run in fake.runs for values in run.sent for name in values})
    assert {run.name for run in fake.runs} == {"one"}, "what comes after the training goes into the same run"


def test_other_callbacks_and_a_given_writer_stay(tmp_path: Path) -> None:
    class Mine(TensorBoardCallback):
        pass

    writer = SimpleNamespace(closed=False)
    callbacks: list[TrainerCallback] = [Mine(), TensorBoardCallback(tb_writer=writer), ProgressCallback()]
    before = list(callbacks)
    group_names(callbacks)
    assert callbacks[0] is before[0] and callbacks[2] is before[2]
    assert callbacks[1] is not before[1] and callbacks[1].tb_writer is writer
