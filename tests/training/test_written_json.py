"""The files that a run leaves, as others read them: JSON without NaN, and a score for every class."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from cankd_hf import evaluate, train
from cankd_hf.json_text import finite, to_json
from cankd_hf.runs.record import Arm, Report, write_json
from tests.policy.sources import package_files

from .detection_folders import write_boxes
from .test_commands import RESNET, recipe
from .tiny_trainers import Images, trainer

NAMES = {0: "small", 1: "agnostic", 2: "a/b"}  # two of them are scores of every detector


def strict(file: Path) -> Any:
    """A file's content as JSON.parse, jq or Go read it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{file}: {word}")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.slow
def test_every_json_file_of_a_run_is_json(tmp_path: Path) -> None:
    """A detector on boxes of one size has no score for the other sizes: nan, which is null in a file."""
    data = write_boxes(tmp_path / "boxes")
    (data / "labels.json").write_text(json.dumps({"id2label": NAMES}))
    student = {"backbone": RESNET, "fpn": {"fpn_channels": 8, "head": "fcos", "head_layers": 1}}
    teacher = {"config": {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 8, "head": "fcos"}}
    file = recipe(
        tmp_path,
        task="detection",
        data={"path": str(data), "image_size": [64, 96], "test_split": "test"},
        student=student,
        teacher={**teacher, "fit": {"max_steps": 1}},
    )
    out = tmp_path / "run"
    changed = yaml.safe_load(Path(file).read_text())
    changed["training"] |= {"eval_strategy": "steps", "eval_steps": 1}
    Path(file).write_text(yaml.safe_dump(changed))
    assert train.main([file]) == 0
    assert train.main([file]) == 0  # reads them again
    assert evaluate.main([str(out), "--json", str(tmp_path / "scores.json")]) == 0
    files = [*out.rglob("*.json"), tmp_path / "scores.json"]
    contents = {path.relative_to(tmp_path).as_posix(): strict(path) for path in files}
    assert {"run/results.json", "run/alone/arm.json", "run/distillation.json", "scores.json"} <= contents.keys()
    history = contents["run/checkpoint-3/trainer_state.json"]["log_history"]
    logged = [entry for entry in history if "eval_ap_large" in entry]
    assert len(logged) == 3 and all(entry["eval_ap_large"] is None for entry in logged)
    scores = contents["scores.json"]
    assert scores["ap_large"] is None and {"ap_small", "ap_agnostic", "ap_a/b"} <= scores.keys()
    assert {"ap_small_class_0", "ap_agnostic_class_1"} <= scores.keys()


def test_saved_metrics_and_states_are_json(tmp_path: Path) -> None:
    made = trainer(tmp_path, Images(8), max_steps=1, per_device_train_batch_size=4)
    made.train()
    made.log({"eval_iou_sky": math.nan, "eval_miou": 0.5})
    made.save_metrics("eval", {"eval_iou_sky": math.nan, "eval_miou": math.inf, "eval_samples": 3})
    made.save_state()
    assert strict(tmp_path / "eval_results.json") == {"eval_iou_sky": None, "eval_miou": None, "eval_samples": 3}
    assert strict(tmp_path / "all_results.json")["eval_iou_sky"] is None
    last = strict(tmp_path / "trainer_state.json")["log_history"][-1]
    assert last["eval_iou_sky"] is None and last["eval_miou"] == 0.5


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, {"b": -math.inf}], "c": (1, True, None, "NaN")})
    assert strict(tmp_path / "x.json") == {"a": [None, {"b": None}], "c": [1, True, None, "NaN"]}
    assert finite(1.5) == 1.5 and to_json([math.nan]) == "[\n  null\n]"


def test_an_arm_read_from_json_has_nan_again() -> None:
    arms = [Arm("teacher", ""), Arm("student alone", "", {"miou": None}), Arm("student distilled", "", {"miou": 0.5})]
    assert math.isnan(arms[1].scores["miou"])
    assert Report("segmentation", "miou", "test", arms, "").gap_closed() is None


def test_nobody_writes_json_otherwise() -> None:
    """Text made by `json.dumps` goes into a file only where its content has no numbers of the run."""
    known = {"json_text.py", "lock.py", "checkpoint_files.py", "card.py"}  # process ids; strict; names
    found = []
    for path in package_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.name in known:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            inner = [arg for arg in node.args if isinstance(arg, ast.Call) and "dumps" in ast.unparse(arg.func)]
            if name == "dump" and ast.unparse(node.func) == "json.dump" or (name in ("write", "write_text") and inner):
                found.append(f"{path}:{node.lineno}")
    assert not found, f"use json_text.to_json: {found}"
