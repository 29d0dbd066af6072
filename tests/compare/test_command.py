"""The command, and the comparisons that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cankd_hf import compare
from cankd_hf.__main__ import COMMANDS
from cankd_hf.__main__ import main as cankd
from cankd_hf.compare import arms as building
from cankd_hf.compare.arms import NO_BLOCK, REFERENCE, TWIN, UNTRAINED, build_arms
from cankd_hf.compare.planning import Planner
from cankd_hf.compare.records import Records
from cankd_hf.compare.settings import as_overrides, load_comparison
from cankd_hf.compare.tuning import tuning_data
from cankd_hf.data.common.folders import slice_of
from cankd_hf.errors import InputError
from cankd_hf.runs.recipe import load_recipe

from .fake import ARMS, base

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "comparisons").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_comparison_has_its_arms_and_controls(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for split in ("train", "val", "test"):  # without images, which nobody reads here
        (tmp_path / "set" / split).mkdir(parents=True)
        (tmp_path / "set" / split / "metadata.jsonl").touch()
    given = [f"recipe.data.path={tmp_path / 'set'}"]
    base = ROOT / yaml.safe_load(path.read_text())["base"]
    if any("model: runs/" in file.read_text() for file in (path, base)):  # a teacher that is trained before
        teacher = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
        given.append(f"recipe.teacher={json.dumps({'model': None, 'config': teacher})}")
    monkeypatch.setattr(building, "labelled_by_people", lambda data: set())  # their sets are made first
    config = load_comparison(path, given)
    records = Records(tmp_path / "records", tmp_path / "runs")
    arms = build_arms(config, records)
    plan = Planner(config, arms, records)
    runs = len(config.all_seeds) if config.screen is None else config.screen.seeds
    # Without a verdict: a screening or a learning curve, of two seeds and not on the test split, priced or not;
    # or a priced table of all seeds, for which no controls were run.
    priced = any(budget.prices is not None for budget in config.budgets)
    if config.judged is None:
        screening = len(config.all_seeds) == 2
        assert screening or priced
        assert all((arm.recipe.data.test_split is None) is screening for arm in arms.values())
    if priced and config.tuning is None:
        with pytest.raises(InputError, match="was priced with another recipe"):  # the set of this test is another
            plan.sweep()
        return
    first = [run.name for run in plan.sweep()]
    if config.judged is None:
        assert config.images == "own" or config.tuning is not None or path.stem == "camvid_ablation"
        each = runs * len(config.budgets) if config.tuning is None else config.tuning.trials
        keys = {str(records.told(arm.recipe)) for arm in arms.values()}  # the teacher of this test is not stored
        assert len(first) == len(keys) * each
        return
    controls = {arm.control: name for name, arm in arms.items() if arm.control != UNTRAINED}
    assert controls[REFERENCE] == "alone" and {NO_BLOCK, TWIN} <= controls.keys()
    untrained = {name.removesuffix(" (untrained teacher)") for name, arm in arms.items() if arm.control == UNTRAINED}
    distilling = {name for name in config.arms if arms[name].distils}
    named = config.judged.untrained
    assert untrained == (distilling - {controls[NO_BLOCK]} if named is None else set(named))
    assert first[0].startswith("alone, trial 1 of " if config.tuning is not None else "alone, 1000 steps")
    assert first.count("teacher") == (config.teacher is not None)  # of all arms, once
    assert {len(plan.config.all_seeds), config.judged.threshold} == {5, 0.005}
    assert all(arm.recipe.data.test_split == "test" for arm in arms.values())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_trial_of_a_shipped_comparison_sees_what_is_scored(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of every split are numbered, the parts of each arm's trials and runs are those of 367."""
    monkeypatch.chdir(ROOT)
    config = load_comparison(path, ["recipe.data.path=shapes"])
    recipe = load_recipe(config.base, as_overrides(config.recipe))
    assert Path(config.records or "").stem == path.stem

    def images(split: str | None) -> set[tuple[str, int]]:
        name, found = ("", ()) if split is None else slice_of(split, 367)
        return {(name, index) for index in found}

    for changes in config.arms.values():
        data = load_recipe(config.base, [*as_overrides(config.recipe), *as_overrides(changes)]).data
        final = images(data.test_split or data.eval_split)
        assert final and images(data.train_split) and not final & images(data.train_split)
        if config.tuning is None:
            continue
        trial = tuning_data(data, config.tuning)
        seen = images(trial.train_split) | (images(trial.unlabelled_split) if data.unlabelled else set())
        assert images(trial.train_split) and trial.test_split is None
        assert not images(trial.eval_split) & (seen | final) and not seen & final
        if trial.eval_split == "validation":  # which nothing has trained on
            continue
        if "camvid" in path.stem and path.stem != "camvid_live":  # cut by clips, of 62, 101 and 204 images
            clips = [{("train", index) for index in range(*ends)} for ends in ((0, 62), (62, 163), (163, 367))]
            if config.images == "shared":
                assert images(trial.eval_split) in clips and sum(bool(seen & clip) for clip in clips) < 3
    assert recipe.task in ("segmentation", "detection")


def test_what_is_wrong_is_told_in_one_line_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "comparison.yaml"
    text = {"base": base(tmp_path), "output_dir": str(tmp_path / "out"), "arms": ARMS, "budgets": [{"steps": 3}]}
    file.write_text(yaml.safe_dump(text))
    for changes, said in (
        (["seeds=1"], "error: seeds (command line): expected a whole number from 2 to 1000"),
        (["base=nothing.yaml"], "base: expected the file of a recipe, got 'nothing.yaml'"),
        (["recipe.data.path=no/such/folder/here"], "arms.alone: data.path: expected a folder"),
        (["--jobs", "0"], "error: --jobs: expected a number from 1 to 1024, got 0"),
        (["recipe.training.max_step=3"], "arms.alone: training.max_step"),
    ):
        assert compare.main([str(file), *changes]) == 2
        told = capsys.readouterr().err.splitlines()
        assert any(said in line for line in told), told
    assert not (tmp_path / "out" / "runs").exists()
    assert compare.main([str(tmp_path / "none.yaml")]) == 2


def test_the_report_of_nothing_is_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "comparison.yaml"
    text = {"base": base(tmp_path), "output_dir": str(tmp_path / "out"), "arms": ARMS, "budgets": [{"steps": 3}]}
    file.write_text(yaml.safe_dump({**text, "verdict": True}))
    assert compare.main([str(file), "--report"]) == 0
    assert "cankd (untrained teacher)" in capsys.readouterr().out
    assert "no claim" in (tmp_path / "out" / "comparison.md").read_text()
    records = tmp_path / "none" / "yet"
    assert compare.main([str(file), f"records={records}", "--report"]) == 0 and not records.exists()


def test_all_commands_have_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cankd(["--help"]) == 0 and cankd([]) == 2 and cankd(["trian"]) == 2
    said = capsys.readouterr()
    assert all(f"  {name} " in said.out for name in COMMANDS) and "got 'trian'" in said.err
    with pytest.raises(SystemExit) as left:
        cankd(["compare", "--help"])
    assert left.value.code == 0 and "--any-code" in capsys.readouterr().out
