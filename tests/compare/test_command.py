"""The command, and the comparisons that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cankd_hf import compare
from cankd_hf.__main__ import COMMANDS
from cankd_hf.__main__ import main as cankd
from cankd_hf.compare.arms import NO_BLOCK, REFERENCE, TWIN, UNTRAINED, build_arms
from cankd_hf.compare.planning import Planner
from cankd_hf.compare.records import Records
from cankd_hf.compare.settings import load_comparison

from .fake import ARMS, base

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "comparisons").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_comparison_has_its_arms_and_controls(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given = [f"recipe.data.path={tmp_path}"]
    if "model: runs/" in path.read_text():  # a teacher that is trained before
        teacher = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
        given.append(f"recipe.teacher={json.dumps({'config': teacher})}")
    config = load_comparison(path, given)
    records = Records(tmp_path / "records", tmp_path / "runs")
    arms = build_arms(config, records)
    first = [run.name for run in Planner(config, arms, records).sweep()]
    if config.judged is None:
        assert config.images == "own" and len(first) == len(arms) * len(config.all_seeds)
        return
    controls = {arm.control: name for name, arm in arms.items() if arm.control != UNTRAINED}
    assert controls[REFERENCE] == "alone" and controls[NO_BLOCK] == "instance_mse" and TWIN in controls
    untrained = {name.removesuffix(" (untrained teacher)") for name, arm in arms.items() if arm.control == UNTRAINED}
    assert untrained == config.arms.keys() - {"alone", "instance_mse"}
    assert first[0].startswith("alone, trial 1 of ")
    assert first.count("teacher") == (config.teacher is not None)  # of all arms, once


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


def test_all_commands_have_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cankd(["--help"]) == 0 and cankd([]) == 2 and cankd(["trian"]) == 2
    said = capsys.readouterr()
    assert all(f"  {name} " in said.out for name in COMMANDS) and "got 'trian'" in said.err
    with pytest.raises(SystemExit) as left:
        cankd(["compare", "--help"])
    assert left.value.code == 0 and "--any-code" in capsys.readouterr().out
