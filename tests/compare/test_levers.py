"""Each lever as an arm of one comparison of the toy, really trained: tiny, and in this process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cankd_hf.compare.arms import build_arms
from cankd_hf.compare.execute import complete
from cankd_hf.compare.planning import Planner, Run
from cankd_hf.compare.records import Record, Records
from cankd_hf.compare.report import MARKDOWN_FILE, PAGE_FILE, as_json, write
from cankd_hf.compare.settings import read_comparison
from cankd_hf.compare.verdict import Findings, judge
from cankd_hf.hub.files import read_json
from cankd_hf.names import ARM_FILE, RESULTS_FILE, STATE_FILE
from cankd_hf.runs import run as running
from tests.processes import ROOT

from .fake import NETWORK, RESNET, rows

pytestmark = pytest.mark.slow  # 29 runs: most of a minute

STEPS, SEEDS = 4, [1, 2]
TERMS: list[dict[str, Any]] = [{"loss": "kl", "weight": 1.0}, {"loss": "instance_mse", "weight": 2.5}]
RECIPE: dict[str, Any] = {
    "data": {
        "generated": {"train": 8, "validation": 2, "test": 4, "unlabelled": 8, "size": 32},
        "image_size": [32, 32],
        "cache": False,
    },
    "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head_channels": 8}},
    "teacher": {"config": NETWORK, "fit": {"max_steps": 4}},
    "distill": {"terms": TERMS},
    "training": {"per_device_train_batch_size": 4, "logging_steps": 1, "use_cpu": True},
}
UNLABELLED = "data.unlabelled=shapes"
ARMS: dict[str, Any] = {
    "alone": ["teacher=null"],
    "joint": None,
    "kl": {"distill.terms": TERMS[:1]},
    "unlabelled": [UNLABELLED, "data.strong.images=none"],
    "strong": [UNLABELLED],
    "features first": ["schedule=features_then_task"],
    "polish": ["schedule=polish"],
    "ema": ["training.ema=0.9"],
    "every": ["teacher.every=2"],
    "fade": ["distill.terms.0.fade=[0.2,0.6]", "distill.terms.1.fade=[0.2,0.6]"],
    "recommended": ["distill.weights=recommended"],
    "guard": ["distill.guard={angle: 1, patience: 1}"],
}
STORED = {"stored": 2, "replayed": 3}  # views; the second reads what the first has written


@dataclass
class Compared:
    """What the comparison left."""

    planner: Planner
    findings: Findings
    runs: int

    def read(self, arm: str, seed: int, file: str) -> dict[str, Any]:
        found = self.planner.outcomes[arm, f"{STEPS} steps", seed].record
        assert found is not None
        return read_json(self.planner.records.runs / found.key / file)

    def arm(self, name: str, seed: int) -> dict[str, Any]:
        return self.read(name, seed, ARM_FILE)

    def logged(self, name: str, key: str) -> list[int]:
        return [entry["step"] for entry in self.read(name, 1, STATE_FILE)["log_history"] if key in entry]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder = tmp_path_factory.mktemp("levers")
    stored = {"codec": "exact", "folder": str(folder / "answers")}
    text = {
        "base": str(ROOT / "recipes" / "quickstart.yaml"),
        "output_dir": str(folder / "out"),
        "recipe": RECIPE,
        # Two epochs of two views are those of a run without a store; a third view is never reached.
        "arms": {**ARMS, **{name: {"teacher.cache": {"views": views, **stored}} for name, views in STORED.items()}},
        "seeds": SEEDS,
        "budgets": [{"steps": STEPS}],
        "curve": 1,
    }
    config = read_comparison(yaml.safe_dump(text, sort_keys=False))
    records = Records(folder / "out" / "records", folder / "out" / "runs")
    planner, started = Planner(config, build_arms(config, records), records), []

    def start(run: Run, place: int) -> Record:
        started.append(run.key)
        place_of_it = records.runs / run.key
        running.run(replace(run.recipe, output_dir=str(place_of_it)))
        return records.record_of(place_of_it, run.key, run.name, run.recipe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running._Session, "picture", lambda self, report: None)  # takes as long as so short a run
        complete(planner, start, 1, lambda line: None)
    planner.sweep()
    findings = judge(planner)
    write("Levers", findings, planner, folder / "out")
    return Compared(planner, findings, len(started))


def test_every_arm_has_its_scores_steps_and_cost_in_all_tables(done: Compared) -> None:
    found, names = rows(done.findings.tables[0]), {*ARMS, *STORED}
    assert not done.planner.failed and found.keys() == names
    assert done.runs == len(names) * len(SEEDS) + 1  # one teacher for all arms, whatever their students' levers
    out = Path(done.planner.config.output_dir)
    told = [(out / file).read_text() for file in (MARKDOWN_FILE, PAGE_FILE)]
    listed = as_json(done.findings, done.planner)["tables"][0]["rows"]
    for name, row in found.items():
        assert all(score is not None for score in row.scores.values()) and len(row.scores) == len(SEEDS)
        assert row.steps == dict.fromkeys(SEEDS, STEPS) and not row.failed
        assert row.charged == {seed: done.arm(name, seed)["cost"]["cpu_seconds"] for seed in SEEDS}
        assert all(name in text for text in told)
        assert [len(one["runs"]) for one in listed if one["arm"] == name] == [len(SEEDS)]
        assert (0 if row.gain is None else row.gain.pairs) == (0 if name == "alone" else len(SEEDS))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_lever_makes_another_student_and_a_store_the_same_one(done: Compared, seed: int) -> None:
    arms = {name: done.arm(name, seed) for name in (*ARMS, *STORED)}
    weights = {name: arm["files"]["model.safetensors"] for name, arm in arms.items()}
    assert {weights.pop(name) for name in STORED} == {weights["joint"]}
    if arms["ema"]["ema"]["chosen"] == "raw":  # which averaging does not touch
        assert weights.pop("ema") == weights["joint"]
    assert len(set(weights.values())) == len(weights)


@pytest.mark.parametrize("seed", SEEDS)
def test_stored_answers_are_counted_and_charged_to_who_reads_them(done: Compared, seed: int) -> None:
    pictures = STEPS * RECIPE["training"]["per_device_train_batch_size"]
    first, second = (done.arm(name, seed) for name in STORED)
    assert [first["cache"]["teacher"][key] for key in ("hits", "misses")] == [0, pictures] and not first["prepaid"]
    assert [second["cache"]["teacher"][key] for key in ("hits", "misses")] == [pictures, 0]
    (name,) = second["prepaid"]
    spent = second["prepaid"][name]["cpu_seconds"]
    assert name.startswith("teacher cache ") and 0 < spent < second["cost"]["cpu_seconds"]
    assert second["cost"]["cpu_seconds_prepaid"] == pytest.approx(spent, abs=1e-3)
    assert any(
        "replayed" in note and "teacher cache" in note for note in as_json(done.findings, done.planner)["notes"]
    )


def test_phases_are_listed_and_their_costs_summed(done: Compared) -> None:
    listed = {"features first": {"features": 2, "task": 2}, "polish": {"joint": 2, "polish_larger": 1, "polish": 1}}
    for name, steps in listed.items():
        arm = done.arm(name, 1)
        assert {phase["name"]: phase["steps"] for phase in arm["phases"]} == steps
        assert sum(phase["share"] for phase in arm["phases"]) == pytest.approx(1)
        for clock in ("cpu_seconds", "wall_seconds"):
            assert arm["cost"][clock] == pytest.approx(sum(one["cost"][clock] for one in arm["phases"]), abs=0.01)
    assert done.arm("joint", 1)["phases"] == []


def test_what_the_other_levers_leave(done: Compared) -> None:
    ema = done.arm("ema", 1)["ema"]
    assert ema["decay"] == 0.9 and ema["chosen"] in ("raw", "ema") and ema["scores"].keys() == {"raw", "ema"}
    for name in ("unlabelled", "strong"):
        facts = done.read(name, 1, RESULTS_FILE)["facts"]["unlabelled"]
        assert facts == {"source": "shapes", "images": 8, "ratio": 1.0}
    assert "unlabelled" not in done.read("joint", 1, RESULTS_FILE)["facts"]
    assert done.logged("joint", "loss_kl") == [1, 2, 3, 4]
    assert done.logged("every", "loss_kl") == [1, 3]
    assert done.logged("fade", "loss_kl") == [1, 2, 3]  # 0 from 60% of the run on
    assert "turned down from step 1" in done.arm("guard", 1)["working"]["weights"]
    assert done.logged("recommended", "weight/instance_mse") and "weights" in done.arm("recommended", 1)["working"]
    assert "weights" not in done.arm("joint", 1)["working"]
    assert done.arm("alone", 1)["working"] == {}
