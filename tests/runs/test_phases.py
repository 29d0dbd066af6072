"""Phases of a run: what each trains and leaves alone, what it costs, and runs that end and go on anywhere in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cankd_hf import Phase
from cankd_hf.config.parts import part_of, phase_parts, spanning
from cankd_hf.config.phases import SCHEDULES, steps_of
from cankd_hf.config.recipe import recipe_to_yaml
from cankd_hf.errors import InputError
from cankd_hf.runs.recipe import parse_recipe
from cankd_hf.runs.run import run
from tests.processes import run_two

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET["layer_type"] = "basic"
FEATURES = {"name": "features", "share": 0.5, "distill": {"task_weight": 0}}
TASK = {"name": "task", "share": 0.25, "training": {"learning_rate": 1e-2}, "frozen": ["encoder"]}
LAST = {"name": "last", "share": 0.25, "data": {"crop_size": [96, 64]}, "distill": {"terms": []}}


def settings(folder: Path, **changes: Any) -> str:
    """A recipe of eight steps in three phases, with a checkpoint at each step."""
    network = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16, "head_channels": 16}
    made: dict[str, Any] = {
        **{"task": "segmentation", "output_dir": str(folder)},
        "data": {
            **{"path": "shapes", "generated": {"train": 8, "validation": 2, "test": 2, "size": 64}},
            **{"crop_size": [64, 64], "test_split": "test"},
        },
        "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
        "teacher": {"config": network},
        "training": {
            **{"max_steps": 8, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 1, "use_cpu": True},
            **{"learning_rate": 1e-3, "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2},
        },
        "phases": [FEATURES, TASK, LAST],
    }
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    return yaml.safe_dump(made)


def go(folder: Path, resume: str | None = None, **changes: Any) -> Any:
    return run(parse_recipe(settings(folder, **changes)), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases") / "run"
    go(folder, baseline=True)
    return folder


def test_each_phase_trains_what_it_says(whole: Path) -> None:
    first, second, last = (weights(whole / place) for place in ("phase-1-features", "phase-2-task", "."))
    frozen = {name for name in first if name.startswith("backbone.")}
    assert any("running_mean" in name for name in frozen), "with the buffers of its norms"
    assert all(torch.equal(first[name], second[name]) for name in frozen)
    assert not any(torch.equal(second[name], last[name]) for name in frozen if name.endswith("conv.weight"))
    started = weights(whole / "phase-1-features" / "checkpoint-1")
    head = [name for name in first if "classifier" in name]
    assert head and all(torch.equal(started[name], first[name]) for name in head), "no labels: no head"
    assert not all(torch.equal(first[name], second[name]) for name in head)

    ends, starts = whole / "phase-1-features", whole / "phase-2-task" / "checkpoint-1"
    connectors = [load_file(place / "distiller.safetensors") for place in (ends, starts)]
    learnt = [name for name, value in connectors[1].items() if value.is_floating_point() and "running" not in name]
    moved = max(float((connectors[0][name] - connectors[1][name]).abs().max()) for name in learnt)
    assert 0 < moved < 0.02, "carried: they are a step away from where they were"
    assert not (whole / "distiller.safetensors").exists()
    assert "train" in (whole / "recipe.yaml").read_text() and "share: 0.25" in (whole / "recipe.yaml").read_text()


def test_steps_and_costs_of_phases_add_up(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    alone, arm = results["arms"][-2:]
    assert [phase["steps"] for phase in arm["phases"]] == [4, 2, 2] and arm["steps"] == 8
    assert [phase["name"] for phase in alone["phases"]] == ["task", "last"] and alone["steps"] == 8
    assert [phase["steps"] for phase in alone["phases"]] == [4, 4] and not alone["phases"][0]["frozen"]
    for clock in ("cpu_seconds", "wall_seconds"):
        assert sum(phase["cost"][clock] for phase in arm["phases"]) == pytest.approx(arm["cost"][clock], abs=0.01)
        assert 0 < arm["cost"][f"{clock}_to_first_step"] < arm["cost"][clock]
    assert sum(phase["cost_share"] for phase in arm["phases"]) == pytest.approx(1, abs=1e-3)
    assert arm["phases"][0]["scores"] == {} and arm["phases"][2]["scores"]["miou"] == arm["scores"]["miou"]

    state = json.loads((whole / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"] if "learning_rate" in entry]
    assert steps == list(range(1, 9)) and state["global_step"] == 8
    spent = [entry["train_cpu_seconds"] for entry in state["log_history"] if "train_cpu_seconds" in entry]
    assert spent == sorted(spent) and spent[-1] <= arm["cost"]["cpu_seconds"]
    facts = json.loads((whole / "distillation.json").read_text())
    assert facts["step"] == facts["planned_steps"] == 8 and facts["teacher"] and facts["terms"]


def cut(whole: Path, target: Path, phase: int, step: int) -> Path:
    """The run as it was when it was killed after a step of a phase; step 0: before its first checkpoint."""
    shutil.copytree(whole, target)
    places = [target / "phase-1-features", target / "phase-2-task", target]
    for place in places[phase + 1 :]:
        for checkpoint in place.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (place / "arm.json").unlink()
    if phase < 1:
        shutil.rmtree(places[1])
    for checkpoint in places[phase].glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    (places[phase] / "arm.json").unlink()
    (target / "model.safetensors").unlink()
    return target


def same(whole: Path, folder: Path) -> bool:
    one, other = weights(whole), weights(folder)
    scores = [
        json.loads((place / "results.json").read_text())["arms"][-1]["scores"]["miou"] for place in (whole, folder)
    ]
    return all(torch.equal(value, other[name]) for name, value in one.items()) and scores[0] == scores[1]


@pytest.mark.slow
def test_a_run_goes_on_in_a_phase_and_at_its_border(whole: Path, tmp_path: Path) -> None:
    for phase, step in ((0, 3), (2, 0)):
        folder = cut(whole, tmp_path / f"{phase}-{step}", phase, step)
        go(folder, baseline=True)
        assert same(whole, folder), (phase, step)
        state = json.loads((folder / "trainer_state.json").read_text())
        assert [e["step"] for e in state["log_history"] if "learning_rate" in e] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_run_goes_on_anywhere(phase: int, whole: Path, tmp_path: Path) -> None:
    for step in range(5 if phase == 0 else 3):
        folder = cut(whole, tmp_path / str(step), phase, step)
        go(folder, baseline=True)
        assert same(whole, folder), step
    again = cut(whole, tmp_path / "named", 1, 2)
    go(again, resume=str(again / "phase-2-task" / "checkpoint-1"), baseline=True)
    assert same(whole, again)


def test_words_stand_for_phases() -> None:
    for word in SCHEDULES:
        made = parse_recipe(settings(Path("x"), phases=None, schedule=word))
        assert made.schedule is None and made.phases
        assert sum(phase.share for phase in made.phases) == pytest.approx(1)
        assert parse_recipe(recipe_to_yaml(made)) == made, "the saved recipe is the same"
    parts = [part for _, part in phase_parts(parse_recipe(settings(Path("x"), phases=None, schedule="polish")))]
    assert [part.data.crop_size for part in parts] == [[64, 64], [96, 96], [64, 64]]
    alone = parse_recipe(settings(Path("x"), teacher=None, phases=None, schedule="frozen_encoder"))
    assert alone.phases is None, "of a student alone one part is left, which is the recipe"


def test_what_is_counted_in_steps_keeps_its_share() -> None:
    training = {"warmup_steps": 4, "max_steps": 100}
    slow = {**LAST, "training": {"warmup_steps": 10}}
    recipe = parse_recipe(settings(Path("x"), training=training, phases=[FEATURES, TASK, slow]))
    assert recipe.phases is not None
    steps = steps_of([phase.share for phase in recipe.phases], 100)
    made = [part_of(recipe, phase, count, 100) for phase, count in zip(recipe.phases, steps, strict=True)]
    assert [part.training["warmup_steps"] for part in made] == [2, 1, 10]
    longer = spanning(recipe, 200).phases
    assert longer is not None and longer[2].training["warmup_steps"] == 20
    assert made[0].training["eval_strategy"] == "no" and made[1].training["eval_strategy"] == "steps"


def test_shares_give_every_phase_a_step() -> None:
    assert steps_of([0.4, 0.6], 101) == [40, 61]
    assert steps_of([0.01, 0.98, 0.01], 3) == [1, 1, 1]
    assert sum(steps_of([1 / 3, 1 / 3, 1 / 3], 1000)) == 1000
    with pytest.raises(InputError, match="at least one step for each of 3 phases, got 2 steps"):
        steps_of([0.01, 0.98, 0.01], 2)


@pytest.mark.parametrize(
    ("phases", "told"),
    [
        ([FEATURES, TASK], r"phases .*: the shares add up to 0\.75 \(0\.5 \+ 0\.25\); make them add up to 1"),
        ([{**FEATURES, "share": 1, "distil": {}}], r"phases\.0\.distil .*unknown key; did you mean 'distill'"),
        ([{**FEATURES, "share": 1, "distill": {"weight": 1}}], r"phases\.0\.distill\.weight .*unknown key"),
        ([{**FEATURES, "share": 1, "training": {"learning_rat": 1}}], r"phases\.0\.training\.learning_rat .*unknown"),
        ([{**FEATURES, "share": 1, "training": {"max_steps": 4}}], r"phases\.0\.training\.max_steps .*its share says"),
        ([{**FEATURES, "share": 1, "data": {"flip": 3}}], r"phases\.0\.data\.flip.*expected a number"),
        ([{**LAST, "share": 1, "distill": {"terms": [], "task_weight": 0}}], r"phases\.0.*leaves nothing to learn"),
        ([{**FEATURES, "share": 0.5, "name": "a b"}, TASK, LAST], r"phases\.0\.name .*expected letters"),
        ([], "phases .*expected at least one phase"),
    ],
)
def test_phases_that_cannot_be_are_told(phases: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_recipe(settings(Path("x"), phases=phases))
    with pytest.raises(InputError, match="schedule .*leave one of them out"):
        parse_recipe(settings(Path("x"), schedule="joint"))


def test_a_later_phase_that_cannot_be_trained_is_told_before_the_first_begins(tmp_path: Path) -> None:
    wrong = [FEATURES, {**TASK, "share": 0.5, "frozen": ["bakbone"]}]
    with pytest.raises(InputError, match="phase task: frozen: the student has no module 'bakbone'"):
        go(tmp_path / "run", phases=wrong)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


@pytest.mark.slow
def test_two_processes_train_the_same_phases_as_one(tmp_path: Path) -> None:
    backbone: dict[str, Any] = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    alike: dict[str, Any] = {  # nothing depends on how a batch is divided
        "student": {"backbone": backbone, "fpn": {"fpn_channels": 8, "norm": "group", "dropout": 0.0}},
        "data": {"scale": [1.0, 1.0]},
        "training": {"optim": "sgd", "learning_rate": 0.05},
        "phases": [FEATURES, {**TASK, "share": 0.5}],
    }
    text = yaml.safe_load(settings(tmp_path / "one", **alike))
    text["distill"] = {"terms": [{"loss": "cankd", "options": {"output_norm": "none"}}]}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(text))
    command = [str(file), f"output_dir={tmp_path / 'two'}", "training.per_device_train_batch_size=1"]
    run_two("-m", "cankd_hf.train", *command)
    run(parse_recipe(file.read_text()))
    for place in ("phase-1-features", "."):
        one, two = weights(tmp_path / "one" / place), weights(tmp_path / "two" / place)
        assert max(float((value - two[name]).abs().max()) for name, value in one.items()) < 1e-5, place
    first = weights(tmp_path / "two" / "phase-1-features")
    assert all(torch.equal(value, two[name]) for name, value in first.items() if name.startswith("backbone."))


def test_a_phase_is_public() -> None:
    made = Phase("features", 0.4, distill={"task_weight": 0})
    assert (made.carry, made.frozen) == ("connectors", [])
