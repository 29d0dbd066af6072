"""The referee with runs that take no time: budgets, controls, tuning, screening, resuming."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.compare import execute, planning, records, report
from cankd_hf.compare.estimate import estimate
from cankd_hf.compare.report import as_json, markdown, page, write
from cankd_hf.compare.settings import read_comparison
from cankd_hf.compare.tuning import trials_of, tuning_data
from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.folders import slice_of
from cankd_hf.errors import InputError

from .fake import ARMS, World, compared, planner, rows

COST = [{"steps": 1000}, {"cost": "alone"}]


def test_a_slower_arm_loses_steps_in_proportion_and_its_schedule_spans_them(tmp_path: Path) -> None:
    world = World()
    made = planner(tmp_path, budgets=COST)
    equal, cost = compared(made, world).tables
    assert all(row.steps == {1: 1000, 2: 1000, 3: 1000} for row in equal.rows)
    assert {name: row.steps[1] for name, row in rows(cost).items()} == {
        "alone": 1000,
        "cankd": 501,
        "instance_mse": 667,
    }
    slept = World(step={"alone": 1.0, "cankd": 4.0, "instance_mse": 1.5})  # two seconds of sleep in each step
    again = compared(planner(tmp_path / "slept", budgets=COST), slept).tables[1]
    assert rows(again)["cankd"].steps[1] == 251 and rows(again)["instance_mse"].steps[1] == 667
    short = next(run.recipe for run in slept.started if run.recipe.training["max_steps"] == 251)
    assert short.training["warmup_steps"] == 13 and short.distill.terms[0].warmup == 25.0
    assert all(abs(value / 1005 - 1) < 0.05 for row in again.rows for value in row.charged.values())


def test_a_run_off_its_budget_is_run_again_with_other_steps_and_told_where_that_does_not_help(tmp_path: Path) -> None:
    world = World(drift={"cankd": 1.5})
    cost = compared(planner(tmp_path, budgets=COST), world).tables[1]
    cankd = rows(cost)["cankd"]
    assert cankd.steps == {1: 333, 2: 333, 3: 333} and not cankd.off
    assert cankd.tried == 4  # the first seed taught the others
    assert rows(cost)["instance_mse"].tried == 3
    made = planner(tmp_path / "once", budgets=COST, attempts=1, verdict=True)
    off = rows(compared(made, World(drift={"cankd": 1.5})).tables[1])["cankd"]
    assert off.off[1] == pytest.approx(0.4975, abs=0.01) and off.claim == "no claim: off its budget"


def test_killed_anywhere_it_goes_on_to_the_same_table_and_runs_nothing_twice(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"budgets": COST, "verdict": True, "screen": {"seeds": 2, "keep": 1}}
    whole = World(drift={"cankd": 1.2})
    made = planner(tmp_path / "whole", **settings)
    found = as_json(compared(made, whole), made)
    assert len({run.key for run in whole.started}) == len(whole.started) > 15
    folder = tmp_path / "killed"
    started: list[str] = []
    for _ in range(100):
        world = World(drift={"cankd": 1.2}, kill_at=6)
        try:
            made = planner(folder, **settings)
            again = as_json(compared(made, world), made)
            break
        except KeyboardInterrupt:
            started += [run.name for run in world.started]
    started += [run.name for run in world.started]
    assert sorted(started) == sorted(run.name for run in whole.started)
    for one in (found, again):
        one.pop("comparison")
        for table in one["tables"]:
            for row in table["rows"]:
                row.pop("runs")
    assert json.dumps(again, default=str) == json.dumps(found, default=str)
    still = World()
    compared(planner(folder, **settings), still)
    assert not still.started


def test_the_plan_counts_the_runs_that_follow(tmp_path: Path) -> None:
    tuning = {"learning_rate": [1e-3, 2e-3], "steps": 50}
    settings: dict[str, Any] = {"recipe": {"teacher": {"fit": {"max_steps": 100}}}, "tuning": tuning}
    made = planner(tmp_path, verdict=True, budgets=[{"steps": 1000}, {"cost": "cankd"}], **settings)
    world = World()
    made.sweep()
    made.calibration = world.calibrate({name: arm for name, arm in made.arms.items() if not arm.follows})
    plan = estimate(made)
    assert "tuning of cankd: 2 runs of 1.7 min" in plan.lines  # 50 steps of 2 s, and the start
    assert (
        "alone, cost of cankd: 3 runs of 33.4 min" in plan.lines
        and "training of teacher: 1 run of 0.1 min" in plan.lines
    )
    compared(made, world)
    assert len(world.started) == plan.runs and estimate(made).runs == 0


def test_side_by_side_gives_the_same_table_at_equal_steps(tmp_path: Path) -> None:
    one = compared(planner(tmp_path / "one", verdict=True, budgets=[{"steps": 1000}]), World())
    made = planner(tmp_path / "three", verdict=True, budgets=[{"steps": 1000}])
    three = compared(made, World(), jobs=3)
    assert [row.scores for row in three.tables[0].rows] == [row.scores for row in one.tables[0].rows]


def test_the_controls_are_run_with_every_verdict(tmp_path: Path) -> None:
    made = planner(tmp_path, arms={"cankd": None}, verdict=True, seeds=5)
    assert {arm.name: arm.control for arm in made.arms.values()} == {
        "cankd": "",
        "alone": "reference",
        "instance_mse": "no block",
        "cankd (untrained teacher)": "untrained teacher",
        "alone (twin)": "twin",
    }
    tables = compared(made, World(worth={"cankd": 0.2}, noise=0.005)).tables
    assert [table.budget for table in tables] == ["1000 steps", "cost of cankd"]  # alone at equal cost, always
    found = rows(tables[0])
    assert found["cankd"].claim == "better" and found["cankd"].block_claim == "better"
    # The fake's scores do not depend on the teacher's weights: the gain is not the teacher's.
    assert not found["cankd"].knowledge.low > 0 and "NOT shown to be the teacher's" in " ".join(tables[0].said)
    assert tables[0].trusted and tables[0].twin.holds(0.0)
    twins = found["alone"].scores, found["alone (twin)"].scores
    assert all(twins[0][seed] != twins[1][seed] for seed in twins[0])
    assert rows(tables[1])["alone"].steps[1] > 1900


def test_a_budget_of_some_arms_has_the_reference_too(tmp_path: Path) -> None:
    world = World()
    budgets = [{"steps": 1000}, {"cost": "cankd", "arms": ["cankd"]}]
    table = compared(planner(tmp_path, verdict=True, budgets=budgets), world).tables[1]
    assert set(rows(table)) == {"alone", "cankd", "alone (twin)", "cankd (untrained teacher)"}
    assert rows(table)["cankd"].claim == "no difference shown" and rows(table)["cankd"].gain.pairs == 3


def test_equal_arms_that_differ_stop_every_claim(tmp_path: Path) -> None:
    made = planner(tmp_path, verdict=True, seeds=5)

    class Tilted(World):
        def run(self, run: Any, place: int) -> Any:
            record = super().run(run, place)
            record.scores["miou"] += 0.3 * ("data_seed" in run.recipe.training)
            return record

    (table, *_) = compared(made, Tilted(worth={"cankd": 0.2})).tables
    assert table.trusted is False
    said = {row.arm: row.claim for row in table.rows if row.claim}
    assert said == dict.fromkeys(["cankd", "instance_mse"], "no claim: two equal arms differ")


def test_a_failed_arm_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    def fails(run: Any) -> bool:
        return run.name.startswith("cankd, 1000 steps, seed 2")

    made = planner(tmp_path, verdict=True)
    table = compared(made, World(fails=fails)).tables[0]
    found = rows(table)
    assert found["cankd"].scores[2] is None and found["cankd"].claim == "no claim: it diverged"
    assert all(score is not None for score in found["instance_mse"].scores.values())
    assert list(made.failed.values()) == ["it diverged"]
    again = World()
    compared(planner(tmp_path, verdict=True), again)
    assert [run.name for run in again.started][:1] == ["cankd, 1000 steps, seed 2"]


def test_where_the_reference_fails_nothing_is_claimed(tmp_path: Path) -> None:
    def fails(run: Any) -> bool:
        return run.name.startswith("alone, 1000 steps, seed 2")

    (table, *_) = compared(
        planner(tmp_path, verdict=True, budgets=COST), World(worth={"cankd": 0.3}, fails=fails)
    ).tables
    assert rows(table)["cankd"].gain.pairs == 2 and rows(table)["cankd"].claim.startswith("no claim")


def test_records_of_other_code_count_only_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"budgets": COST, "recipe": {"teacher": {"fit": {"max_steps": 100}}}}
    first = compared(planner(tmp_path, **settings), World(drift={"cankd": 1.2}))
    for module in (records, planning, execute, report):
        monkeypatch.setattr(module, "code_hash", lambda: "other")
    made, world = planner(tmp_path, **settings), World()
    made.sweep()
    assert made.unfinished
    kept = planner(tmp_path, **settings)
    kept.records.any_code = True
    again = compared(kept, world)
    assert [row.scores for table in again.tables for row in table.rows] == [
        row.scores for table in first.tables for row in table.rows
    ]
    assert not world.started and "made by other code" in " ".join(report.notes(again, kept))


def test_tuning_cannot_see_the_test_split_and_gives_all_arms_as_many_trials(tmp_path: Path) -> None:
    tuning = {"learning_rate": [1e-3, 3e-3, 3e-2], "weight": [1.0, 4.0]}
    world = World(worth={"cankd": 0.1})
    made = planner(tmp_path, tuning=tuning, verdict=True)
    compared(made, world)
    trials = [run for run in world.started if "trial" in run.name]
    counted = {name: sum(run.name.startswith(f"{name}, trial") for run in trials) for name in ARMS}
    assert counted == {"alone": 6, "cankd": 6, "instance_mse": 6} and len(trials) == 18
    for run in trials:
        data = run.recipe.data
        assert data.test_split is None and data.train_split == "train[20%:@0]" and data.eval_split == "train[:20%@0]"
    parts = [set(slice_of(text, 24)[1]) for text in ("train[20%:@0]", "train[:20%@0]")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(range(24)) and len(parts[1]) == 5
    few = tuning_data(DataConfig(path="x", train_split="train[::8]"), made.config.tuning)
    assert few.train_split == "train[::8][20%:@0]" and few.eval_split == "train[::8][:20%@0]"
    assert made.tuned["cankd"].learning_rate <= 3e-3
    finals = [run.recipe for run in world.started if run.name.startswith(("alone, 1000", "alone (twin), 1000"))]
    assert {recipe.training["learning_rate"] for recipe in finals} == {made.tuned["alone"].learning_rate}
    assert {recipe.data.test_split for recipe in finals} == {"test"}
    assert len(set(trials_of(made.config.tuning, made.arms["alone"]))) == 6


@pytest.mark.parametrize(
    "data", [DataConfig(path="x", train_split="test", test_split="testing"), DataConfig(path="x", streaming=True)]
)
def test_a_tuning_split_that_would_hold_test_images_is_refused(data: DataConfig) -> None:
    config = read_comparison(
        "base: a\noutput_dir: b\narms: {a: }\nbudgets: [{steps: 1}]\ntuning: {learning_rate: [1e-3]}"
    )
    with pytest.raises(InputError, match="data.test_split: testing is the training split|a stream cannot be cut"):
        tuning_data(data, config.tuning)


def test_screening_keeps_the_best_and_the_controls(tmp_path: Path) -> None:
    arms = {**ARMS, **{f"grid {grid}": {"distill.grid": grid} for grid in ("student", "teacher")}}
    world = World(worth={"cankd": 0.1})
    made = planner(tmp_path, arms=arms, verdict=True, seeds=4, budgets=COST, screen={"seeds": 2, "keep": 1})
    table = compared(made, world).tables[0]
    found = rows(table)
    kept = [name for name, row in found.items() if len(row.scores) == 4]
    assert {"alone", "instance_mse", "alone (twin)"} < set(kept) and sum("untrained" in name for name in kept) == 1
    dropped = [row for row in found.values() if row.screened]
    assert len(dropped) == 2 and all(row.claim == "dropped by the screening" for row in dropped)


def test_the_report_is_one_file_and_nothing_in_it_is_markup(tmp_path: Path) -> None:
    arms = {"alone": ["teacher=null"], "<b>x|y": None}
    made = planner(tmp_path, arms=arms, verdict=True, budgets=[{"steps": 1000}, {"cost": "<b>x|y"}])
    findings = compared(made, World(worth={"cankd": -0.2}))
    shown = page("Comparison <i>", findings, made)
    assert "<b>x" not in shown and "&lt;b&gt;x|y" in shown and "Comparison &lt;i&gt;" in shown
    assert shown.count("data:image/png;base64,") == 2 and "http" not in shown
    assert "is WORSE than alone" in " ".join(findings.tables[0].said)
    text = markdown(findings, made)
    assert "<b>" not in text and all(line.count(" | ") == 8 for line in text.splitlines() if line.startswith("|"))
    write("x", findings, made, tmp_path)
    saved = json.loads((tmp_path / "comparison.json").read_text())
    (row,) = (row for row in saved["tables"][0]["rows"] if row["arm"] == "<b>x|y")
    assert row["gain"]["mean"] == pytest.approx(-0.2, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arms": {"a": ["seed=3"], "b": None}}, "seed is not for an arm: arms are paired by their seeds"),
        ({"arms": {"a": {"data": {"test_split": "x"}}, "b": None}}, "data.test_split is not for an arm"),
        ({"arms": {"a": ["data={path: x}"], "b": None}}, "data is not for an arm"),
        ({"arms": {"a": ["data.eval_split=x"]}, "images": "own"}, "data.eval_split is not for an arm"),
        ({"images": "own", "verdict": True}, "arms that train on other images are not paired"),
        ({"arms": {"a": ["training.max_steps=3"]}}, "training.max_steps is not for an arm: the budget decides"),
        ({"budgets": [{"steps": 3, "cost": "alone"}]}, "expected exactly one of steps and cost"),
        ({"budgets": [{"cost": "alon"}]}, "did you mean 'alone'"),
        ({"seeds": [1, 1]}, "expected each seed once"),
        ({"screen": {"seeds": 4}}, "expected at most the 3 of `seeds`"),
        ({"verdict": {"refrence": "alone"}}, "did you mean 'reference'"),
        ({"charge_teacher": True}, "known only where the comparison trains it"),
        ({"arms": {"a": ["distill.terms.0.loss=cankdd"]}}, "arms.a: distill.terms.0.loss"),
        ({"arms": {"a": ["distill.terms.0.weight=-1"]}}, "arms.a: distill.terms.0.weight"),
    ],
)
def test_mistakes_are_one_line_each(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        planner(tmp_path, **changes)
    assert any(said in problem for problem in error.value.problems), error.value.problems


def test_a_learning_curve_over_labels_has_arms_with_images_of_their_own(tmp_path: Path) -> None:
    arms = {"all": ["teacher=null"], "few": ["teacher=null", "data.train_split=train[::8]"]}
    made = planner(tmp_path, arms=arms, images="own", budgets=[{"steps": 10}], verdict=False)
    assert made.arms["few"].recipe.data.train_split == "train[::8]"
    assert "a learning curve" in " ".join(report.notes(compared(made, World()), made))


def test_the_training_of_a_teacher_is_charged_only_where_it_is_asked_for(tmp_path: Path) -> None:
    teacher = {"fit": {"max_steps": 100}}
    for charge, steps in ((False, 501), (True, 447)):
        folder = tmp_path / str(charge)
        made = planner(folder, budgets=[{"cost": "alone"}], charge_teacher=charge, recipe={"teacher": teacher})
        table = compared(made, World()).tables[0]
        assert rows(table)["cankd"].steps[1] == steps and rows(table)["cankd"].taught == 105.0


def test_an_arm_that_is_augmented_too_strongly_is_named(tmp_path: Path) -> None:
    """Where the task's training loss is above that of an arm that differs in `data.strong` alone."""
    more = "data.unlabelled=shapes"
    arms = {"weak": [more, "data.strong.images=none"], "strong": [more], "other": [more, "data.unlabelled_ratio=3"]}
    made = planner(tmp_path, arms=arms)
    compared(made, World())
    assert "Images without labels are seen by other, strong, weak" in " ".join(
        report.notes(compared(made, World()), made)
    )

    def told(losses: dict[str, float]) -> str:
        for (name, *_), one in made.outcomes.items():
            if one.record is not None:
                one.record.task_loss = losses[name]
                one.record.settings = records.settings_that_count(asdict(made.arms[name].recipe))
        return " ".join(report.overdone(made))

    assert "is 1.2 in strong and 1 in weak" in told({"weak": 1.0, "strong": 1.2, "other": 0.1})
    assert not told({"weak": 1.0, "strong": 0.9, "other": 2.0})
