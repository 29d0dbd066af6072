"""Converted models against MMDetection itself, run in an environment of its own (see `upstream.py`)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.convert.command import convert
from cankd_hf.convert.reading import read_checkpoint

PYTHON = os.environ.get("CANKD_UPSTREAM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON, reason="CANKD_UPSTREAM names no Python with mmdet 3.3"),
]


def upstream(tmp_path: Path, kind: str, config: str, *changes: str) -> tuple[Any, dict[str, Any]]:
    """Our model and what theirs was given and gave."""
    out = tmp_path / "out.pt"
    subprocess.run([PYTHON, str(Path(__file__).parent / "upstream.py"), config, str(out), *changes], check=True)
    model, plan = convert(read_checkpoint(Path(f"{out}.pth"), "student"), kind, "auto", None)
    seen = torch.load(out, weights_only=True)
    mean, std = (torch.tensor(x)[:, None, None] for x in plan.pixels)
    seen["pixels"] = [(image.flip(0).float() - mean) / std for image in seen["images"]]
    return model, seen


def test_dino(tmp_path: Path) -> None:
    model, seen = upstream(tmp_path, "dino", "dino/dino-4scale_r50_8xb2-12e_coco.py", "model.num_queries=300")
    mask = torch.zeros(len(seen["inputs"]), *seen["inputs"].shape[-2:])
    for place, image in enumerate(seen["pixels"]):
        height, width = image.shape[-2:]
        mask[place, :height, :width] = 1
        torch.testing.assert_close(seen["inputs"][place, :, :height, :width], image)
    with torch.no_grad():
        output = model(seen["inputs"], pixel_mask=mask)
    torch.testing.assert_close(output.encoder_last_hidden_state, seen["memory"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.logits, seen["logits"], rtol=1e-4, atol=1e-4)
    boxes = output.intermediate_reference_points.transpose(0, 1)
    torch.testing.assert_close(boxes, seen["boxes"], rtol=1e-4, atol=1e-5)
    assert seen["boxes"].std() > 0.1
