"""What would make a comparison unfair, or end it: each is refused, left out or told."""

from __future__ import annotations

import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import ResNetBackbone, ResNetConfig

from cankd_hf import compare
from cankd_hf.compare import execute
from cankd_hf.compare.arms import NO_BLOCK, REFERENCE, TWIN, UNTRAINED
from cankd_hf.compare.execute import Processes, calibrated
from cankd_hf.compare.records import Records
from cankd_hf.compare.report import notes
from cankd_hf.compare.verdict import BETTER, Row, Table, compare_rows, judge
from cankd_hf.errors import InputError
from cankd_hf.tasks import TASKS
from cankd_hf.training.lock import FolderLock

from .fake import ARMS, NETWORK, RESNET, World, base, compared, planner, rows

COST = [{"steps": 1000}, {"cost": "alone"}]


@pytest.mark.parametrize("lost", ["off", "failed"])
@pytest.mark.parametrize("which", ["alone", "instance_mse"])
def test_nothing_is_claimed_against_an_arm_that_missed_its_budget(which: str, lost: str, tmp_path: Path) -> None:
    made = planner(tmp_path, verdict=True)
    scores = {"alone": 0.1, "cankd": 0.5, "instance_mse": 0.3, "alone (twin)": 0.1}
    table = Table("x", "alone", [])
    draw = random.Random(0)
    for name, score in scores.items():
        table.rows.append(Row(name, made.arms[name].control, {seed: draw.gauss(score, 0.001) for seed in (1, 2, 3)}))
    compare_rows(table, True, made)
    found = rows(table)
    assert (found["cankd"].claim, found["cankd"].block_claim) == (BETTER, BETTER)
    if lost == "off":
        found[which].off = {2: -0.3}
        said = f"no claim: {which} is off its budget"
    else:
        found[which].failed = ["it diverged"]
        said = f"no claim: {which} failed"
    compare_rows(table, True, made)
    cankd = found["cankd"]
    assert (cankd.claim, cankd.block_claim) == ((said, BETTER) if which == "alone" else (BETTER, said))


def test_a_screening_sees_validation_scores_and_not_those_of_the_test_split(tmp_path: Path) -> None:
    arms = {**ARMS, **{f"grid {grid}": {"distill.grid": grid} for grid in ("student", "teacher")}}

    class Opposed(World):
        """What is best in validation is worst in the test."""

        def run(self, run: Any, place: int) -> Any:
            record = super().run(run, place)
            best = run.recipe.distill.grid == "teacher"
            record.scores["miou"] = 0.2 if best else 0.5
            record.curve[-1]["score"] = 0.9 if best else 0.5
            return replace(record)

    made = planner(tmp_path, arms=arms, seeds=4, screen={"seeds": 2, "keep": 1})
    found = rows(compared(made, Opposed()).tables[0])
    assert not found["grid teacher"].screened and len(found["grid teacher"].scores) == 4
    assert found["grid student"].screened and found["cankd"].screened
    for wrong in ({"curve": 0}, {"recipe": {"data": {"eval_split": None}}}):
        with pytest.raises(InputError, match="has no validation scores, by which arms are screened"):
            planner(tmp_path / "none", arms=arms, screen={"seeds": 2, "keep": 1}, **wrong)
    steps = made.arms["cankd"].at(1, 1002).training["eval_steps"]
    assert steps == 250 and made.arms["cankd"].at(1, 3).training["eval_steps"] == 1


def test_an_arm_that_cannot_be_measured_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    made = planner(tmp_path, budgets=COST, verdict=True)
    made.sweep()

    def measure(arms: Any) -> dict[str, Any]:
        costs = World().calibrate({name: arm for name, arm in arms.items() if name != "cankd"})
        return {**costs, "failed": {"cankd": "no such map"}}

    told: list[str] = []
    calibrated(made, measure, told.append)
    assert "cankd: failed: no such map" in told
    table = compared(made, World(fails=lambda run: run.name.startswith("cankd"))).tables[1]
    assert rows(table)["cankd"].failed == ["what a step costs could not be measured: no such map"]
    assert all(score is not None for score in rows(table)["instance_mse"].scores.values())
    assert not made.unfinished
    again: list[str] = []
    calibrated(made, World().calibrate, again.append)  # it may have been mended
    assert again and not made.uncalibrated


def test_costs_of_a_step_on_another_machine_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planner(tmp_path, budgets=COST)
    for measured in (True, False):
        told: list[str] = []
        calibrated(made, World().calibrate, told.append)
        assert bool(told) == measured
    monkeypatch.setattr(execute, "machine", lambda: {"device": "another"})
    calibrated(planner(tmp_path, budgets=COST), World().calibrate, told.append)
    assert told


def test_what_an_arm_spends_once_is_learned_from_its_earlier_seeds(tmp_path: Path) -> None:
    class Statistics(World):
        def run(self, run: Any, place: int) -> Any:
            record = super().run(run, place)
            if run.recipe.named_teachers():  # 200 seconds before its first step
                cost = {name: seconds + 200 for name, seconds in record.cost.items()}
                return replace(record, cost=cost)
            return record

    arms = {name: ARMS[name] for name in ("alone", "cankd")}
    found = rows(compared(planner(tmp_path, arms=arms, budgets=COST), Statistics()).tables[1])["cankd"]
    assert found.tried == 4 and not found.off  # only the first seed's first try was off


def test_what_was_spent_before_a_run_is_charged_in_full_to_every_run(tmp_path: Path) -> None:
    made = planner(tmp_path, budgets=[{"cost": "cankd"}])
    world = World(before={"instance_mse": 900.0})
    table = rows(compared(made, world).tables[0])
    assert set(table["instance_mse"].steps.values()) == {(2005 - 900 - 5) * 2 // 3}, "of 1.5 s each"
    assert not table["instance_mse"].off and table["instance_mse"].tried == 4, "only the first seed is run again"
    assert set(table["alone"].steps.values()) <= {1999, 2000} and not table["alone"].off
    assert "Before each run of instance_mse, 900 s were spent (teacher cache), charged in full." in notes(
        judge(made), made
    )

    dear = planner(tmp_path / "dear", budgets=[{"cost": "cankd"}])
    lost = rows(compared(dear, World(before={"instance_mse": 2100.0})).tables[0])["instance_mse"]
    assert lost.failed and "teacher cache alone cost 2100 of 2005 seconds" in lost.failed[0]


def test_a_plan_writes_nothing_and_a_report_needs_no_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"base": base(tmp_path), "output_dir": str(tmp_path / "out"), "arms": ARMS, "budgets": COST, "seeds": 2}
    file = tmp_path / "a comparison, größer.yaml"
    file.write_text(yaml.safe_dump(text))
    monkeypatch.setattr(Processes, "calibrate", lambda self, arms: World().calibrate(arms))
    before = sorted(tmp_path.rglob("*"))
    assert compare.main([str(file), "--plan"]) == 0
    assert "Estimated time" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before
    out = tmp_path / "out"
    (out / "records").mkdir(parents=True)
    with FolderLock(out):
        (out / ".lock").write_text((out / ".lock").read_text().replace(str(os.getpid()), str(os.getppid())))
        monkeypatch.setattr("cankd_hf.training.lock._alive", lambda process, started: True)
        monkeypatch.setattr("cankd_hf.training.lock._held", {})
        assert compare.main([str(file)]) == 2 and "is training in it" in capsys.readouterr().err
        assert compare.main([str(file), "--report"]) == 0 and (out / "comparison.html").is_file()
        assert compare.main([str(file), "--plan"]) == 0
        monkeypatch.undo()


def test_an_untrained_teacher_has_no_trained_part(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pretrained = ResNetBackbone(ResNetConfig(**{**RESNET, "out_features": ["stage4"]}))
    pretrained.save_pretrained(tmp_path / "backbone")
    source = str(tmp_path / "backbone")
    teacher = {"student": {"backbone": source, "fpn": {"fpn_channels": 8, "head_channels": 8}}, "teacher": None}
    file = base(tmp_path / "teacher", **teacher, distill={"terms": []})
    of_recipe = planner(tmp_path, verdict=True, teacher=file)
    inner = {**NETWORK, "backbone_config": {"pretrained": source}}
    of_fit = planner(tmp_path, verdict=True, changes={"teacher": {"config": inner, "fit": {"max_steps": 3}}})
    for made in (of_recipe, of_fit):
        (trained,), (untrained,) = made.arms["cankd"].teachers, made.arms["cankd (untrained teacher)"].teachers
        assert trained.key != untrained.key and untrained.recipe.training["learning_rate"] == 0
        for run, equal in ((trained, True), (untrained, False)):
            task, _ = TASKS["segmentation"].from_data(run.recipe.data, splits=())
            model = task.build_student(run.recipe.student)
            weight = model.state_dict()["backbone.embedder.embedder.convolution.weight"]
            assert torch.equal(weight, pretrained.state_dict()["embedder.embedder.convolution.weight"]) == equal


def test_the_controls_fit_the_arms(tmp_path: Path) -> None:
    two = {"distill.terms": [{"loss": "instance_mse"}, {"loss": "kl", "weight": 1.0}]}
    made = planner(tmp_path, arms={"both": two, "alone (twin)": ["teacher=null"]}, verdict=True)
    by_control = {arm.control: arm for arm in made.arms.values() if arm.control}
    assert [term.loss_name for term in by_control[NO_BLOCK].recipe.distill.terms] == ["instance_mse"]
    assert by_control[TWIN].follows == by_control[REFERENCE].name == "alone (twin)"
    both = planner(tmp_path, arms={"cankd": None}, verdict=True, changes={"distill": {"terms": [{"loss": "kl"}, {}]}})
    (control,) = (arm for arm in both.arms.values() if arm.control == NO_BLOCK)
    assert [term.loss_name for term in control.recipe.distill.terms] == ["kl", "instance_mse"]
    plain = planner(
        tmp_path,
        arms={"instance_mse": ARMS["instance_mse"], "cankd": None, "alone": ["teacher=null"]},
        verdict={"reference": "instance_mse"},
    )
    assert plain.arms["instance_mse"].control == REFERENCE
    with pytest.raises(InputError, match="teacher: no arm learns from a teacher"):
        planner(tmp_path, arms={"a": ["teacher=null"]}, teacher=base(tmp_path / "teacher"))
    with pytest.raises(InputError, match=re.escape("tuning.learning_rate")):
        planner(tmp_path, tuning={"learning_rate": [1e-3, 1e-3]})


def test_without_labels_there_is_no_student_alone_and_no_untrained_teacher(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"task": "features", "student": {"backbone": RESNET}, "teacher": {"config": RESNET}}
    changes["distill"] = {"task_weight": 0.0, "terms": [{"loss": "cankd"}]}
    changes["data"] = {"path": "shapes", "crop_size": [64, 64], "eval_split": None}
    made = planner(
        tmp_path, arms={"cankd": None, "cosine": {"distill.terms.0.loss": "cosine"}}, verdict=True, changes=changes
    )
    controls = {arm.name: arm.control for arm in made.arms.values()}
    assert controls == {"cankd": REFERENCE, "cosine": "", "instance_mse": NO_BLOCK, "cankd (twin)": TWIN}
    assert UNTRAINED not in controls.values() and len(made.budgets) == 1


def test_a_plan_that_changes_in_between_keeps_what_was_run(tmp_path: Path) -> None:
    def started(arms: dict[str, Any], seeds: Any) -> set[str]:
        world = World(drift={"cankd": 1.2})
        made = planner(tmp_path, arms=arms, seeds=seeds, budgets=COST)
        made.sweep()
        calibrated(made, world.calibrate, lambda line: None)
        compared(made, world)
        assert not made.unfinished
        return {run.name.partition(", try")[0] for run in world.started}

    two = {name: ARMS[name] for name in ("alone", "cankd")}
    assert len(started(two, 2)) == 6  # alone at the cost of alone is alone at 1000 steps
    assert started(ARMS, 2) == {
        f"instance_mse, {label}, seed {n}" for label in ("1000 steps", "cost of alone") for n in (1, 2)
    }
    assert all("seed 7" in name for name in started(two, [2, 1, 7])) and not started(ARMS, 2)
    edited = {**two, "cankd": {"distill.terms.0.weight": 1.0}}
    assert {name.partition(",")[0] for name in started(edited, 2)} == {"cankd"}
    (tmp_path / "out" / "records" / "schedule.json").unlink()  # then steps are planned anew, by the same rule
    assert not {name for name in started(edited, 2) if "1000 steps" in name}
    for half in (tmp_path / "out" / "records").glob("?" * 16 + ".json"):
        half.write_text(half.read_text()[:100])
    with pytest.raises(InputError, match="expected JSON, got .*; remove the file"):
        started(edited, 2)


def test_files_count_by_what_is_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made, keys = planner(tmp_path), []
    labels, model = Path("labels.json"), Path("plain")  # a folder beside, without a slash in its name
    model.mkdir()
    for text in ("a", "b"):
        for file in (labels, model / "preprocessor_config.json", model / "config.json"):
            file.write_text(text)
            recipe = made.arms["cankd"].recipe
            recipe = replace(recipe, data=replace(recipe.data, labels=str(labels)))
            assert recipe.teacher is not None
            recipe = replace(recipe, teacher=replace(recipe.teacher, config=None, model=str(model)))
            keys.append(Records(tmp_path / "records", tmp_path / "runs").recipe_key(recipe))
    assert len(set(keys)) == 6
