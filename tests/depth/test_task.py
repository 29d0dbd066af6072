"""Depth goes through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cankd_hf import evaluate, export, train
from cankd_hf.config.data import DataConfig
from cankd_hf.errors import InputError
from cankd_hf.label.teacher import open_teacher
from cankd_hf.tasks import TASKS

from .families import FAMILIES, RESNET

SMALL = {"fpn_channels": 8, "head_channels": 8}
DATA = {
    **{"path": "shapes", "generated": {"train": 8, "validation": 4, "test": 4, "size": 32}, "test_split": "test"},
    **{"image_size": [32, 32], "depth": {"max": 12.0}},
}


def recipe(folder: Path, **changes: Any) -> Path:
    """A distilled student and the same student alone; the best of four checkpoints is kept."""
    settings: dict[str, Any] = {
        "task": "depth",
        "output_dir": str(folder / "run"),
        "data": DATA,
        "student": {"backbone": RESNET, "fpn": SMALL},
        "teacher": {"config": {"model_type": "cankd_fpn", "head": "depth", "backbone_config": RESNET, **SMALL}},
        "distill": {"terms": [{"loss": "cankd", "weight": 0.1}]},
        "baseline": True,
        "training": {
            **{"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4, "logging_steps": 1},
            **{"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True},
            **{"metric_for_best_model": "abs_rel", "use_cpu": True, "disable_tqdm": True},
        },
        **changes,
    }
    file = folder / "depth.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("depth")
    assert train.main([str(recipe(folder))]) == 0
    return folder / "run"


def test_the_best_student_has_the_lowest_error(finished: Path) -> None:
    state = json.loads((finished / "trainer_state.json").read_text())
    errors = {entry["step"]: entry["eval_abs_rel"] for entry in state["log_history"] if "eval_abs_rel" in entry}
    assert state["best_global_step"] == min(errors, key=lambda step: errors[step])
    results = json.loads((finished / "results.json").read_text())
    assert results["greater_is_better"] is False and {"abs_rel", "rmse", "delta1"} <= set(
        results["arms"][-1]["scores"]
    )
    with Image.open(finished / "predictions.png") as picture:
        assert picture.size[0] > 300
    card = (finished / "README.md").read_text()
    for words in (
        "tells the distance of every pixel",
        "pipeline_tag: depth-estimation",
        "type: abs_rel",
        "at most 12 m",
    ):
        assert words in card, card


def test_it_is_scored_again_and_labels_nothing(finished: Path, tmp_path: Path) -> None:
    assert evaluate.main([str(finished), "--json", str(tmp_path / "scores.json")]) == 0
    wanted = json.loads((finished / "results.json").read_text())["arms"][-1]["scores"]["abs_rel"]
    assert json.loads((tmp_path / "scores.json").read_text())["abs_rel"] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(InputError, match="expected a model with a head whose outputs are labels, got one of depth"):
        open_teacher(str(finished), None, None, None)


@pytest.mark.slow
def test_onnx_gives_what_pytorch_gives(finished: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export.main([str(finished), "--size", "64", "96", "--no-latency", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "export.json").read_text())
    assert report["outputs"] == ["predicted_depth"] and report["task"] == "depth" and report["classes"] == []
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 72, 56)
    with torch.no_grad():
        wanted = TASKS["depth"].load(finished)(pixel_values=images).predicted_depth
    found = session.run(None, {"pixel_values": images.numpy()})[0]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_pictures_say_what_was_fitted(finished: Path) -> None:
    made, data = TASKS["depth"].from_data(DataConfig(**{**DATA, "check": "none"}))
    sample, model = data.eval[0], TASKS["depth"].load(finished).eval()
    truth = made.truth(sample)
    answer = made.answer(model, sample["pixel_values"])
    painted = made.paint(np.zeros((32, 32, 3)), answer, truth)
    assert painted.dtype == np.uint8 and painted.shape == (32, 32, 3)
    assert made.caption(answer, truth).startswith("AbsRel ") and "fitted" not in made.caption(answer, truth)
    assert made.caption((answer[0], True), truth).endswith("scale and shift fitted") and "m" in made.caption(
        truth, truth
    )
    worst = made.image_scores(np.array([[4.0, 1, 0, 0, 0, 0, 0, 0, 0], [0.0] * 9]))
    assert worst.values[0] == 0.25 and np.isnan(worst.values[1]) and not worst.greater_is_better


@pytest.mark.slow
def test_a_task_without_classes_scores_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Native models have two nameless classes in their configuration, whatever their task."""
    teacher = TASKS["depth"].from_data(DataConfig(**DATA))[0].build_student(_of(FAMILIES["glpn"]))
    teacher.save_pretrained(tmp_path / "teacher")
    changes = {
        "teacher": {"model": str(tmp_path / "teacher")},
        "baseline": False,
        "student": {"config": FAMILIES["glpn"]},
    }
    training = {"max_steps": 1, "use_cpu": True, "eval_strategy": "no", "per_device_train_batch_size": 2}
    assert train.main([str(recipe(tmp_path, training=training, **changes))]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["teacher", "student distilled"]


def _of(config: dict[str, Any]) -> Any:
    from cankd_hf.config.student import StudentConfig

    return StudentConfig(config=config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_eight_images_are_learned_by_heart(kind: str, tmp_path: Path) -> None:
    data = {**DATA, "generated": {"train": 8, "validation": 8, "test": 8, "size": 64}, "image_size": [64, 64]}
    data |= {"train_split": "train", "eval_split": "train", "test_split": "train", "scale": [1.0, 1.0], "flip": 0.0}
    data["depth"] = {"kind": kind, **({"max": 12.0} if kind == "metric" else {})}
    training = {
        **{"max_steps": 400, "learning_rate": 0.004, "per_device_train_batch_size": 8, "use_cpu": True},
        **{"lr_scheduler_type": "cosine", "eval_strategy": "no", "logging_steps": 100, "disable_tqdm": True},
    }
    changes = {"data": data, "training": training, "teacher": None, "baseline": False, "distill": {}}
    changes["student"] = {
        "backbone": {**RESNET, "hidden_sizes": [16, 32, 48, 64], "embedding_size": 16},
        "fpn": {"dropout": 0.0},
    }
    assert train.main([str(recipe(tmp_path, **changes))]) == 0
    scores = json.loads((tmp_path / "run" / "results.json").read_text())["arms"][-1]["scores"]
    assert scores["abs_rel"] <= 0.05, scores
