"""How heavy each term is, in the log of every run: the share is that of the gradients; measuring changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cankd_hf import CanKDTrainer, LossTerm, Objective
from cankd_hf.config.distill import Guard
from cankd_hf.training.conflict import told

from .test_shares import norms, term
from .tiny_trainers import Images, largest_difference, trainer, weights

LINES = "cankd_hf.training.trainer.MEASURE_EVERY"  # steps between two measurements
NAME = "gradient_share/mse"


def fixed(weight: float = 2.0, **settings: Any) -> LossTerm:
    return LossTerm(**{"loss": "mse", "weight": weight, "pairs": [[-1, -1]], **settings})


def ran(folder: Path, *terms: LossTerm, data: Any = None, task_weight: float = 1.0, **settings: Any) -> CanKDTrainer:
    objective = Objective(task_weight, terms, frozen=settings.pop("frozen", ()), guard=settings.pop("guard", None))
    settings = {"learning_rate": 0.0, "max_steps": 1, **settings}
    made = trainer(folder, data or Images(8), terms=None, objective=objective, **settings)
    made.train()
    return made


def logged(made: CanKDTrainer, name: str = NAME) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


def test_the_share_is_that_of_the_gradients(tmp_path: Path) -> None:
    made = ran(tmp_path, fixed(), fixed(0.5, loss="cosine", options={"cosine": 1.0, "smooth_l1": 0.0}))
    found = norms(made)
    whole = sum(found.values())
    assert logged(made) == [pytest.approx(found["mse"] / whole, rel=1e-3)]
    assert logged(made, "gradient_share/cosine") == [pytest.approx(found["cosine"] / whole, rel=1e-3)]


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_weight_by_share_has_the_share_it_asks_for(share: float, tmp_path: Path) -> None:
    assert logged(ran(tmp_path, term(share))) == [pytest.approx(share, rel=1e-3)]


def test_a_weight_of_nothing_and_a_term_that_is_over_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINES, 1)
    made = ran(tmp_path, fixed(1e-9, fade=[0.3, 0.6]), max_steps=10, logging_steps=2)
    first, *_, last = found = logged(made)
    assert len(found) == 5 and 0 < first < 1e-6 and found[3:] == [0.0, 0.0] and last == 0.0
    assert told(made.state.log_history) == "mse: share of the gradient at its taps 0.0% to 0.0%"


def test_it_is_measured_before_a_log_line_but_not_too_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINES, 4)
    made = ran(tmp_path, fixed(), max_steps=11, logging_steps=3)
    assert [entry["step"] for entry in made.state.log_history if "raw_cka/s3t0" in entry] == [3, 6, 9]
    assert [entry["step"] for entry in made.state.log_history if NAME in entry] == [6]


def test_measuring_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINES, 1)
    settings = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "gradient_accumulation_steps": 2}
    on, off = (
        ran(tmp_path / str(measured), fixed(), term(0.2, name="shared"), measure_similarity=measured, **settings)
        for measured in (True, False)
    )
    assert len(logged(on)) == 4 and not logged(off)
    assert largest_difference(weights(on), weights(off)) == 0


def test_it_is_not_told_where_it_cannot_be_known(tmp_path: Path) -> None:
    assert not logged(ran(tmp_path / "no task", fixed(), task_weight=0.0))
    made = ran(tmp_path / "frozen", LossTerm(loss="cankd"), frozen=["backbone", "neck"])
    assert not logged(made, "gradient_share/cankd")
    again = ran(tmp_path / "checkpointing", fixed(), gradient_checkpointing=True)
    assert not logged(again) and "loss_mse" in again.state.log_history[0]


def test_the_share_beside_a_guard_is_that_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LINES, 1)
    made = ran(tmp_path, fixed(fade=[0.3, 0.6]), guard=Guard(floor=1.0), max_steps=10, logging_steps=5)
    before, after = logged(made)
    assert 0 < before < 1 and after == 0.0
    assert "not turned down" in told(made.state.log_history)


def test_the_end_is_said_where_the_command_does_not_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, Images(8), terms=[fixed()], max_steps=1)
    for said in (False, True):
        made.working.says_the_end = said
        made.train()
        assert caplog.text.count("Weights: mse: share of the gradient") == said
