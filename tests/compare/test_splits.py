"""What trials, arms and claims see: tuning by clips, labels of people and teachers, budgets at any steps, origins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cankd_hf.compare.execute import Processes, RunFailed
from cankd_hf.compare.planning import Run
from cankd_hf.compare.report import notes
from cankd_hf.compare.settings import TuningConfig, read_comparison
from cankd_hf.compare.tuning import Trial, tuning_data
from cankd_hf.compare.verdict import judge
from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import Guard, Share
from cankd_hf.config.parts import terms_of
from cankd_hf.data.common.folders import slice_of
from cankd_hf.data.common.sources import settled
from cankd_hf.errors import InputError
from cankd_hf.names import LABEL_RECORDS
from cankd_hf.tasks import TASKS

from .fake import ARMS, World, compared, planner, rows


def written(folder: Path, count: int) -> list[str]:
    """A split of small pictures with masks; returns their names."""
    names = [f"{number}.png" for number in range(count)]
    (folder / "masks").mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(np.full((32, 32, 3), 40 * number, np.uint8)).save(folder / name)
        Image.fromarray(np.full((32, 32), number % 2, np.uint8)).save(folder / "masks" / name)
    lines = [{"file_name": name, "mask_file_name": f"masks/{name}"} for name in names]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return names


def tuned(data: dict[str, Any], **tuning: Any) -> tuple[str | None, ...]:
    made = tuning_data(DataConfig(path="x", test_split="test", **data), TuningConfig([1e-3], **tuning))
    assert made.test_split is None
    return made.train_split, made.eval_split, made.unlabelled_split


def test_trials_are_scored_on_a_clip_that_nothing_of_them_sees() -> None:
    few = {"train_split": "train[::8]", "unlabelled": "x"}
    assert tuned(few, eval_split="train[:62]") == ("train[::8]-train[:62]", "train[:62]", "train-train[:62]")
    assert tuned({"unlabelled": "x"}) == ("train[20%:@0]", "train[:20%@0]", "train[20%:@0]")
    own = {"eval_split": "clip", "left_out": "train[:54]+train[321:329]"}
    left = "-train[:54]-train[321:329]"
    assert tuned({"train_split": "train[321:]"}, **own) == (f"train[321:]{left}", "clip", "auto")
    assert tuned({"unlabelled": "x", "unlabelled_split": "train[:321]"}, **own)[2] == f"train[:321]{left}"
    assert tuned({}, eval_split="validation") == ("train", "validation", "auto")
    assert tuned({"unlabelled": "elsewhere"}, eval_split="train[:9]")[2] == "auto"


@pytest.mark.parametrize(
    ("data", "tuning", "said"),
    [
        ({}, {"eval_split": "testing[:3]"}, "scored in the end"),
        ({}, {"eval_split": "train[:62]", "left_out": "train[:61]"}, "does not hold all of"),
        ({}, {"eval_split": "clip", "left_out": "other[:61]"}, "expected a part of train"),
        ({}, {"eval_split": "clip", "left_out": "train[:9]-train[:2]"}, "drop the -"),
        ({"train_split": "train[::8]", "unlabelled": "x"}, {}, "name tuning.eval_split"),
        ({"test_split": "train[:62]", "train_split": "train[50:]"}, {}, "also in the training split"),
        ({"test_split": "train[:62]", "train_split": "train[62:]"}, {"eval_split": "train[60:99]"}, "in the end"),
    ],
)
def test_a_trial_that_would_see_too_much_is_refused(data: dict[str, Any], tuning: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tuning_data(DataConfig(path="x", **{"test_split": "test", **data}), TuningConfig([1e-3], **tuning))


def test_a_budget_is_the_cost_of_an_arm_at_any_number_of_steps(tmp_path: Path) -> None:
    made = planner(tmp_path, budgets=[{"cost": "alone", "at": 400}, {"cost": "alone", "at": 2000}])
    short, long = compared(made, World()).tables
    assert (short.budget, long.budget) == ("cost of 400 steps of alone", "cost of 2000 steps of alone")
    assert {name: row.steps[1] for name, row in rows(short).items()} == {
        "alone": 400,
        "cankd": 201,
        "instance_mse": 267,
    }
    assert rows(long)["alone"].steps[1] == 2000 and rows(long)["cankd"].steps[1] == 1001
    with pytest.raises(InputError, match="is the number of steps of the arm in `cost`"):
        planner(tmp_path, budgets=[{"steps": 400, "at": 3}])


def test_runs_of_other_code_or_another_machine_are_in_the_table_and_not_in_a_claim(tmp_path: Path) -> None:
    made = planner(tmp_path, verdict={"margin": 0.05}, seeds=5)
    found = compared(made, World(worth={"cankd": 0.3, "instance_mse": 0.2}, noise=0.001)).tables[0]
    assert rows(found)["cankd"].claim == "better" and "instance_mse is shown not to hurt" in " ".join(found.said)
    for (name, _, seed), one in made.outcomes.items():
        if name == "cankd" and seed == 2 and one.record is not None:
            one.record = replace(one.record, machine={"device": "another"})
    again = rows(judge(made).tables[0])
    assert again["cankd"].claim == "no claim: runs of alone were made by other code, or elsewhere"
    assert again["instance_mse"].claim == "better" and again["cankd"].gain.pairs == 5


def test_an_arm_that_is_not_shown_to_be_harmless_is_named(tmp_path: Path) -> None:
    made = planner(tmp_path, verdict={"margin": 0.005}, seeds=3)
    said = " ".join(compared(made, World(noise=0.05)).tables[0].said)
    assert "cankd is NOT shown to be harmless: the lower end is -" in said and "against -0.005" in said


def test_what_a_run_beside_others_cost_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Beside(World):
        def run(self, run: Any, place: int) -> Any:
            return replace(super().run(run, place), beside=True)

    budgets = {"budgets": [{"steps": 1000}], "verdict": {"equal_cost": False}}
    made = planner(tmp_path, **budgets)
    table = compared(made, Beside()).tables[0]
    assert len(judge(made).tables) == 1 and all(row.scores for row in table.rows)
    one = made.outcomes["alone", "1000 steps", 1].record
    assert one is not None and (made.records.runs / one.key).is_dir()

    def start(self: Processes, kind: str, file: Path, log: Path, place: int) -> int:
        assert not (made.records.runs / one.key).exists(), "a finished run would only be read again"
        log.write_text("stopped")
        return 1

    monkeypatch.setattr(Processes, "_start", start)
    with pytest.raises(RunFailed, match="stopped"):
        Processes(made.records).run(Run(one.key, "again", made.arms["alone"].at(1, 1000)), 0)
    world = World()
    compared(planner(tmp_path, budgets=[{"steps": 1000}, {"cost": "alone"}]), world)
    again = {run.name for run in world.started if "1000 steps" not in run.name}
    assert {f"alone, cost of alone, seed {seed}" for seed in (1, 2, 3)} < again
    assert not [run for run in world.started if "1000 steps" in run.name]


def test_a_best_learning_rate_at_an_end_is_told(tmp_path: Path) -> None:
    made = planner(tmp_path, tuning={"learning_rate": [1e-3, 2e-3, 4e-3]}, seeds=2, verdict=True)
    told = " ".join(notes(compared(made, World()), made))
    ends = [name for name, trial in made.tuned.items() if trial.learning_rate != 2e-3]
    assert (f"The best learning rate of {', '.join(ends)} is" in told) == bool(ends)
    assert "Each of the 2 tables is judged by itself: in all of them it is at most 2 of 20" in told


def test_weights_chosen_by_what_is_scored_are_told(tmp_path: Path) -> None:
    changes = {"data": {"test_split": None, "eval_split": "validation"}}
    made = planner(tmp_path, arms={**ARMS, "average": ["training.ema=auto"]}, recipe=changes)
    assert "ema chose the weights of average by the split that is scored" in " ".join(
        notes(compared(made, World()), made)
    )


def test_the_recommended_schedule_is_the_recipe_with_the_guard_and_alone_it_is_the_recipe(tmp_path: Path) -> None:
    arms = {
        "alone": ["teacher=null", "schedule=recommended"],
        "plain": ["teacher=null", "schedule=joint"],
        "recommended": ["schedule=recommended"],
        "weights": ["distill.weights=recommended"],
        "own guard": ["schedule=recommended", "distill.guard={floor: 0.5}"],
        "no guard": ["schedule=recommended", "distill.guard=false"],
    }
    made = planner(tmp_path, arms=arms)
    keys = {name: made.records.recipe_key(arm.recipe) for name, arm in made.arms.items()}
    assert keys["alone"] == keys["plain"]
    recipe = made.arms["recommended"].recipe
    assert recipe.phases is not None and [(one.share, one.distill) for one in recipe.phases] == [
        (1.0, {"guard": True})
    ]
    for name, guard in (("own guard", Guard(floor=0.5)), ("no guard", None)):  # what the recipe says itself stays
        own = made.arms[name].recipe
        assert own.phases is not None and [one.distill for one in own.phases] == [{}] and own.distill.guarding == guard
    shares = [[term.weight for term in terms_of(Trial(1e-3, x).of(made.arms["weights"].recipe))] for x in (1.0, 0.25)]
    assert shares == [[Share(0.5)], [Share(0.2)]]
    weights = [[term.weight for term in terms_of(Trial(1e-3, x).of(recipe))] for x in (1.0, 0.25)]
    assert weights == [[2.5], [0.625]]


def test_arms_may_differ_in_labels_of_a_teacher_and_in_no_others(tmp_path: Path) -> None:
    data = tmp_path / "set"
    names, *_ = [written(data / split, count) for split, count in (("train", 6), ("val", 2), ("test", 2))]
    (data / "labels.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
    records = [{"name": f"train/{name}", "picture": name} for name in names[:4]]
    (data / LABEL_RECORDS).write_text("".join(f"{json.dumps(one)}\n" for one in records))

    def made(*splits: str) -> Any:
        arms = {f"arm {split}": ["teacher=null", f"data.train_split={split}"] for split in splits}
        recipe = {"data": {"path": str(data), "generated": {}}}
        return planner(
            tmp_path, arms=arms, recipe=recipe, images="labelled", verdict={"reference": f"arm {splits[0]}"}
        )

    assert {"arm train[4:]", "arm train"} <= made("train[4:]", "train", "train[2:]").arms.keys()
    with pytest.raises(InputError, match=r"arms.arm train\[5:\]: .*expected the 2 images with labels of people"):
        made("train[4:]", "train[5:]")
    with pytest.raises(InputError, match="data.train_split is not for an arm"):
        read_comparison(
            "base: a\noutput_dir: b\narms: {a: [data.train_split=train]}\nbudgets: [{steps: 1}]\nimages: shared"
        )


def test_trials_never_see_what_is_held_out_for_the_final_scores(tmp_path: Path) -> None:
    for number in range(40):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.png").touch()
    data = DataConfig(path=str(tmp_path), test_split="test")
    found = tuning_data(settled(data, TASKS["classification"].open_data(data)), TuningConfig([1e-3]))
    final = {*slice_of("train[80%:@0]", 80)[1]}  # validation and test, by the tenth
    assert final and all(final.isdisjoint(slice_of(split, 80)[1]) for split in (found.train_split, found.eval_split))
