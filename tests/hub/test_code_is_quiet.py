"""The code on our cards and at the end of a run: with every warning an error it runs, and says nothing but results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cankd_hf import train
from cankd_hf.hub.card import render_card
from cankd_hf.hub.facts import read_facts
from tests.training.detection_folders import write_boxes
from tests.training.native_detector_configs import config as native
from tests.training.test_commands import RESNET, recipe

ROOT = Path(__file__).parents[2]
MAPS = {**RESNET, "out_indices": [1, 2, 3, 4]}
SEGFORMER = {
    **{"model_type": "segformer", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    **{"num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8},
}
FEATURES: dict[str, Any] = {"task": "features", "teacher": {"config": MAPS}, "distill": {"task_weight": 0}}
FEATURES["distill"]["terms"] = [{"loss": "cankd"}]
STUDENTS: dict[str, dict[str, Any]] = {
    "segmentation": {"teacher": None},
    "detection": {"teacher": None, "task": "detection", "student": {"backbone": RESNET, "fpn": {"fpn_channels": 8}}},
    "features": {**FEATURES, "student": {"backbone": MAPS}},
    "segformer": {"teacher": None, "student": {"config": SEGFORMER}},
    "detr": {"teacher": None, "task": "detection", "student": {"config": native("detr")}},
    "rt_detr": {"teacher": None, "task": "detection", "student": {"config": native("rt_detr")}},
    "timm": {**FEATURES, "student": {"backbone": {"model_type": "timm_backbone", "backbone": "test_resnet"}}},
}
STUDENTS["detection"]["student"]["fpn"] |= {"head": "fcos", "head_layers": 1}
FEW = ["segmentation", "detection"]


def codes(name: str, folder: Path) -> list[str]:
    """The code on the card of a student that was trained for a step, and that at the end of its run."""
    folder.mkdir()
    changes = {"baseline": False, "training": {"max_steps": 1, "use_cpu": True, "disable_tqdm": True}}
    if STUDENTS[name].get("task") == "detection":
        changes["data"] = {"path": str(write_boxes(folder / "boxes")), "image_size": [64, 96]}
    assert train.main([recipe(folder, **changes, **STUDENTS[name])]) == 0
    facts = read_facts(folder / "run")
    card = render_card(facts, str(folder / "run"))
    return [card.split("```python\n")[1].split("```")[0], facts.task.quick_usage(facts.config, str(folder / "run"))]


@pytest.mark.parametrize("names", [FEW, pytest.param([n for n in STUDENTS if n not in FEW], marks=pytest.mark.slow)])
def test_the_code_says_nothing_but_its_results(names: list[str], tmp_path: Path) -> None:
    snippets = [code for name in names for code in codes(name, tmp_path / name)]
    # What needs our package comes last: before it, everything loads as where it is not installed.
    snippets.sort(key=lambda code: "cankd_hf." in code or "import cankd_hf" in code)
    Image.effect_noise((96, 72), 80).convert("RGB").save(tmp_path / "photo.jpg")
    script = "import json, sys\nfor code in json.loads(sys.argv[1]):\n    exec(code, {})\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, json.dumps(snippets)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
