"""The Python code of the start page and of the page on deploying runs."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cankd_hf.export import main as export

from ..policy.sources import ROOT

STUDENT = ROOT / "tests/data/camvid_student"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_start_page_distils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ..training.tiny_trainers import Images, student, teacher

    monkeypatch.chdir(tmp_path)
    (code,) = blocks("index.md")
    assert code.count('"facebook/dinov2-base"') == 1 and code.count("max_steps=1000") == 1
    names: dict[str, Any] = {"tiny": teacher()}
    exec(code.replace('"facebook/dinov2-base"', "tiny").replace("max_steps=1000", "max_steps=2, use_cpu=True"), names)
    assert names["distil"](student(), Images(8), Images(4)).state.global_step == 2


@pytest.mark.slow
def test_exported_files_run_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STUDENT, "runs/camvid_seg")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), np.uint8)).save("photo.jpg")
    for form in ("onnx", "torch-export"):
        assert export(["runs/camvid_seg", "--format", form, "--size", "180", "240", "--no-latency"]) == 0
    defined, used, core_ml, torch_export = blocks("deploying.md")
    names: dict[str, Any] = {}
    exec(defined + used, names)
    assert names["mask"].shape == (60, 100) and set(np.unique(names["mask"])) <= set(range(11))
    exec(torch_export, names)
    assert names["logits"][0].shape == (1, 11, 64, 64)
    if find_spec("coremltools") is not None:
        exec(core_ml, names)
        assert Path("student.mlpackage").is_dir()
