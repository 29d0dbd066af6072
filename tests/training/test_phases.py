"""`CanKDTrainer.train_phases`: phases of a training without a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cankd_hf import Objective, Phase
from cankd_hf.config.distill import Guard
from cankd_hf.errors import InputError

from .tiny_trainers import largest_difference, terms, trainer

PHASES = [
    Phase("features", 0.5, distill={"task_weight": 0.0}),
    Phase("task", 0.5, distill={"terms": []}, training={"learning_rate": 0.01}, frozen=["encoder"]),
]


def made(folder: Path) -> Any:
    return trainer(folder, max_steps=4, save_strategy="steps", save_steps=1, per_device_train_batch_size=4)


def test_phases_train_in_turn_and_go_on_at_a_border_and_within(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole")
    whole.train_phases(PHASES)
    first = load_file(tmp_path / "whole" / "phase-1-features" / "model.safetensors")
    last = {name: value.clone() for name, value in whole.student.state_dict().items()}
    frozen = [name for name in first if name.startswith("backbone.")]
    assert frozen and all(torch.equal(first[name], last[name]) for name in frozen)
    assert any(not torch.equal(first[name], last[name]) for name in set(first) - set(frozen))
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates == [0.01, 0.01] and whole.args.max_steps == 4 and whole.args.learning_rate == 0.05
    with pytest.raises(InputError, match="holds phases of an earlier training; resume=True goes on with them"):
        whole.train_phases(PHASES)
    whole.save_model(str(tmp_path / "saved"))
    facts = json.loads((tmp_path / "saved" / "distillation.json").read_text())
    assert [(phase["name"], phase["steps"]) for phase in facts["phases"]] == [("features", 2), ("task", 2)]

    for name, left in (("border", ["phase-1-features"]), ("within", ["phase-1-features/checkpoint-1"])):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        for path in (tmp_path / name).rglob("*"):
            inside = str(path.relative_to(tmp_path / name))
            kept = any(inside.startswith(place) or place.startswith(inside) for place in left)
            if not kept and path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        again = made(tmp_path / name)
        again.train_phases(PHASES, resume=True)
        assert largest_difference(last, again.student.state_dict()) == 0.0, name


def test_each_phase_keeps_the_guard(tmp_path: Path) -> None:
    guarded = Objective(terms=terms(), guard=Guard())
    objectives = made(tmp_path)._checked([Phase("first", 0.5), Phase("last", 0.5, distill={"terms": []})], guarded)
    assert [objective.guard for objective in objectives] == [guarded.guard, guarded.guard]


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        (PHASES[:1], r"phases: the shares add up to 0\.5"),
        ([Phase("a", 1.0, data={"flip": 0.0})], r"phases\.0\.data: is for recipes"),
        ([Phase("a", 1.0, training={"seed": 3})], r"phases\.0\.training\.seed: is the same for the whole run"),
        ([Phase("a", 1.0, training={"fp16": True})], r"phases\.0\.training\.fp16: is of the whole training"),
        ([Phase("a", 1.0, distill={"grid": "finer"})], r"phases\.0\.distill\.grid: is of the whole training"),
        ([Phase("a", 1.0, distill={"task_weight": 0, "terms": []})], r"phases\.0.*leaves nothing to train"),
        ([PHASES[0], Phase("a", 0.5, frozen=["nothing"])], r"phases\.1: frozen: the student has no module 'nothing'"),
    ],
)
def test_phases_that_cannot_be_trained_are_told_first(phases: list[Phase], told: str, tmp_path: Path) -> None:
    one = made(tmp_path)
    with pytest.raises(InputError, match=told):
        one.train_phases(phases)
    assert not list(tmp_path.rglob("checkpoint-*")) and list(one.distiller.objective.terms) == terms()
