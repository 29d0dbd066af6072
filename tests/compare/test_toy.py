"""Comparisons of the toy, really trained: minutes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cankd_hf.compare.calibrate import calibrate
from cankd_hf.config.recipe import recipe_to_yaml
from cankd_hf.losses import InstanceMSELoss
from cankd_hf.runs.recipe import load_recipe
from tests.processes import ROOT, environment

from .fake import ARMS, NETWORK, World, base, compared, planner, rows

TRAINING = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "use_cpu": True}
TRAINING |= {"logging_steps": 5, "save_steps": 20, "warmup_steps": 0.05}


def written(folder: Path, **settings: Any) -> str:
    """A comparison of the toy in a file."""
    teacher = {"config": {**NETWORK, "fpn_channels": 16}, "fit": {"max_steps": 40}}
    recipe = base(folder, training=TRAINING, teacher=teacher, distill={"terms": [{"loss": "cankd", "weight": 2.5}]})
    text = {"base": recipe, "output_dir": str(folder / "out"), "arms": ARMS, "seeds": 3, **settings}
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump(text, sort_keys=False))
    return str(file)


def command(file: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "cankd_hf.compare", file, *more]


def table(folder: Path) -> dict[str, Any]:
    """What was found, without the costs, which no two runs have alike."""
    found = json.loads((folder / "out" / "comparison.json").read_text())
    return {
        row["arm"]: (row["scores"], row["gain"], row["claim"], row["knowledge"], row["block"])
        for row in found["tables"][0]["rows"]
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_arms_and_seeds_at_both_budgets_in_ten_minutes(tmp_path: Path) -> None:
    file = written(tmp_path, budgets=[{"steps": 60}, {"cost": "cankd"}], verdict=True)
    done = subprocess.run(command(file), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    for words in (
        "Plan of 5 arms, 3 seeds, 2 budgets",
        "Estimated time",
        "Self-check, two equal arms",
        "alone (twin)",
    ):
        assert words in done.stdout
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for one in found["tables"]:
        by_name = {row["arm"]: row for row in one["rows"]}
        alone, twin = by_name["alone"]["scores"], by_name["alone (twin)"]["scores"]
        assert all(alone[seed] != twin[seed] for seed in alone)
        assert one["twin"]["low"] <= 0 <= one["twin"]["high"] and one["trusted"]
    cost = {row["arm"]: row for row in found["tables"][1]["rows"]}
    assert all(steps > 60 for steps in cost["alone"]["steps"].values())
    assert all(row["curve"] for row in cost.values())
    assert (tmp_path / "out" / "comparison.html").stat().st_size > 20_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_while_it_trains_it_goes_on_to_the_same_table(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"budgets": [{"steps": 60}], "arms": {"alone": ["teacher=null"], "cankd": None}}
    whole, killed = (written(tmp_path / name, **settings, seeds=2) for name in ("whole", "killed"))
    run = {"cwd": ROOT, "env": environment(), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert subprocess.run(command(whole), **run, timeout=400).returncode == 0
    runs = tmp_path / "killed" / "out" / "runs"
    for number, ending in enumerate([signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT]):
        before = set(runs.glob("*/checkpoint-*"))
        process = subprocess.Popen(command(killed), **run)
        end = time.monotonic() + 120
        # Once while it calibrates, then each time when there is another checkpoint.
        while time.monotonic() < end and process.poll() is None:
            if set(runs.glob("*/checkpoint-*")) - before if number else (runs / "calibration.log").exists():
                break
            time.sleep(0.05)
        os.kill(process.pid, ending)
        assert process.wait(60) != 0
    done = subprocess.run(command(killed), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert table(tmp_path / "killed") == table(tmp_path / "whole")
    again = subprocess.run(command(killed), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert again.returncode == 0 and "steps ->" not in again.stdout


@pytest.mark.slow
def test_a_sleep_in_a_loss_takes_steps_from_its_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, sleep = InstanceMSELoss.forward, 0.1

    def slowed(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(sleep)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(InstanceMSELoss, "forward", slowed)
    files = {}
    for name, change in (("cankd", []), ("instance_mse", ["distill.terms.0.loss=instance_mse"])):
        recipe = load_recipe(base(tmp_path, training=TRAINING), change)
        (tmp_path / f"{name}.yaml").write_text(recipe_to_yaml(recipe))
        files[name] = str(tmp_path / f"{name}.yaml")
    measured = calibrate(files, {}, rounds=3, steps=4)
    costs = {name: cost["wall_seconds"] for name, cost in measured["arms"].items()}
    pairs = 4  # one sleep for each pair of levels
    assert costs["instance_mse"] - costs["cankd"] > 0.6 * sleep * pairs, costs
    assert measured["arms"]["instance_mse"]["cpu_seconds"] < costs["instance_mse"]
    world = World(step={"alone": costs["cankd"], **costs})
    arms = {"cankd": None, "instance_mse": ARMS["instance_mse"]}
    made = planner(tmp_path / "planned", arms=arms, budgets=[{"cost": "cankd"}], clock="wall")
    made.calibration = measured
    found = rows(compared(made, world).tables[0])
    share = found["instance_mse"].steps[1] / found["cankd"].steps[1]
    assert share == pytest.approx(costs["cankd"] / costs["instance_mse"], rel=0.05)
