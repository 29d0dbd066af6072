"""A new task goes through every command, and no file of the package has to know of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from cankd_hf import evaluate, export, train, visualize
from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.decode import Sample, Unusable
from cankd_hf.figures import warning_signs
from cankd_hf.runs.record import Arm, Report
from cankd_hf.tasks import TASKS, saved_task

from .hub.stand_in import TOKEN, problems, running_hub
from .toy_task import Lamps, ToyTask

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
PUSH = """
import sys
from cankd_hf import push
from cankd_hf.tasks import TASKS
from tests.toy_task import ToyTask
TASKS["toy"] = ToyTask
sys.exit(push.main([sys.argv[1], "me/toy"]))
"""


def recipe(folder: Path) -> Path:
    """A distilled student and the same student alone, four steps each, the best of which is kept."""
    settings: dict[str, Any] = {
        "task": "toy",
        "output_dir": str(folder / "run"),
        "data": {"path": "lamps", "test_split": "test", "image_size": [64, 64]},
        "student": {"backbone": {**RESNET, "out_indices": [1, 2]}},
        "teacher": {"config": {"model_type": "dinov2", "mlp_ratio": 2, **VIT}},
        "distill": {"terms": [{"loss": "cankd", "weight": 2.5}]},
        "baseline": True,
        "training": {
            "max_steps": 4,
            "learning_rate": 0.05,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "mae",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy", ToyTask)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "toy", ToyTask)
        assert train.main([str(recipe(folder))]) == 0
    return folder / "run"


def test_the_best_student_has_the_lowest_error(finished: Path) -> None:
    state = json.loads((finished / "trainer_state.json").read_text())
    errors = {entry["step"]: entry["eval_mae"] for entry in state["log_history"] if "eval_mae" in entry}
    best = min(errors, key=lambda step: errors[step])
    assert len(set(errors.values())) > 1 and state["best_global_step"] == best
    kept, saved = (load_file(place / "model.safetensors") for place in (finished, finished / f"checkpoint-{best}"))
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    results = json.loads((finished / "results.json").read_text())
    assert results["metric"] == "mae" and results["greater_is_better"] is False
    assert [arm["name"] for arm in results["arms"]] == ["student alone", "student distilled"]
    assert (finished / "predictions.png").is_file()


def test_a_dry_run_shows_the_step_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(recipe(tmp_path)), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "one step of one process" in shown and not (tmp_path / "run").exists()


def test_it_scores_the_same_again_with_and_without_its_recipe(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((finished / name).read_bytes())
    assert saved_task(str(bare)) is ToyTask
    wanted = json.loads((finished / "results.json").read_text())["arms"][-1]["scores"]["mae"]
    for words in ([str(finished)], [str(bare), "data.path=lamps", "data.test_split=test"]):
        assert evaluate.main([*words, "--json", str(tmp_path / "scores.json")]) == 0
        assert json.loads((tmp_path / "scores.json").read_text())["mae"] == pytest.approx(wanted, abs=1e-6)
    assert "mae" in capsys.readouterr().out


def test_its_maps_can_be_looked_at(finished: Path, tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 80).save(tmp_path / "lamp.png")
    for words in (["--count", "1"], ["--images", str(tmp_path / "lamp.png")]):
        assert visualize.main([str(finished), *words, "--output", str(tmp_path / "looks")]) == 0
    page = (tmp_path / "looks" / "report.html").read_text()
    assert "light meter" in page and "Mean absolute error" in page


def test_its_file_gives_what_it_gives(finished: Path, tmp_path: Path) -> None:
    words = ["--format", "torch-export", "--size", "64", "96", "--no-latency", "--output", str(tmp_path)]
    assert export.main([str(finished), *words]) == 0
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["outputs"] == ["brightness"] and report["classes"] == [] and report["task"] == "toy"
    images = torch.randn(2, 3, 80, 64)
    with torch.no_grad():
        wanted = ToyTask.load(finished)(pixel_values=images).logits
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(images)[0], wanted)


def test_its_card_says_what_it_is_and_is_pushed(finished: Path, tmp_path: Path) -> None:
    card = (finished / "README.md").read_text()
    for words in ("A light meter of", "type: mae", "| Mean absolute error | Worst error |", "never seen two lamps"):
        assert words in card, card
    assert problems(card) == []
    with running_hub() as hub:
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **own, "HF_TOKEN": TOKEN, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(finished)], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        files = hub.repos["me/toy"].branches["main"][-1]
    assert files["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert b"me/toy" in files["README.md"] and "distiller.safetensors" not in files


def test_a_falling_score_is_read_the_right_way_round() -> None:
    scores = {"teacher": 0.1, "student alone": 0.5, "student distilled": 0.3}
    arms = [Arm(name, "x", {"mae": score}) for name, score in scores.items()]
    assert Report("toy", "mae", "test", arms, "x", {}, greater_is_better=False).gap_closed() == pytest.approx(0.5)
    assert Report("toy", "mae", "test", arms, "x").gap_closed() is None
    logs = [{"step": step, "eval_mae": error} for step, error in ((1, 0.5), (2, 0.1), (3, 0.4))]
    measured = {name: {"mae": score} for name, score in scores.items()}
    (sign,) = warning_signs(logs, "mae", measured, greater_is_better=False)
    assert "best at step 2" in sign
    assert len(warning_signs(logs, "mae", measured)) == 2


def test_a_broken_image_of_its_data_is_found_by_the_shared_checks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Lamps.load

    def load(self: Lamps, index: int) -> Sample:
        if index == 1:
            raise Unusable("lamp 1 is out")
        return whole(self, index)

    monkeypatch.setattr(Lamps, "load", load)
    assert train.main([str(recipe(tmp_path))]) == 2
    _, data = ToyTask.from_data(DataConfig(path="lamps", test_split="test", on_error="skip"))
    assert len(data.train) == 15 and data.facts["skipped"]["count"] == 3
