"""Detectors in a fresh process: without cankd_hf (remote code), and with nothing but `import cankd_hf`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DeformableDetrImageProcessor

from tests.instances.kinds import KINDS, student
from tests.instances.kinds import pictures as outlined_pictures
from tests.processes import forked

from .detectors import DETECTORS, detector, pictures
from .test_dino import dino

SCRIPT = """
import sys, torch
from PIL import Image
{preamble}
from transformers import AutoModelForObjectDetection, pipeline
for kind, (images, labels, loss, logits) in torch.load("cases.pt").items():
    model = AutoModelForObjectDetection.from_pretrained(kind, trust_remote_code={remote})
    with torch.no_grad():
        output = model(images, labels=labels)
    torch.testing.assert_close((output.loss, output.logits), (loss, logits))
    assert type(model).__module__.split(".")[0] == "{home}", type(model)
from transformers import AutoModelForInstanceSegmentation
for kind, (images, labels, loss, masks) in torch.load("masked.pt").items():
    model = AutoModelForInstanceSegmentation.from_pretrained(kind, trust_remote_code={remote})
    with torch.no_grad():
        output = model(images, labels=labels)
    torch.testing.assert_close((output.loss, output.pred_masks), (loss, masks))
    found = model.post_process_instance_segmentation(output, 0.0, [(50, 60)] * 2)
    assert found[0]["masks"].shape == (4, 50, 60) and type(model).__module__.split(".")[0] == "{home}"
assert len(pipeline("object-detection", "dino", trust_remote_code={remote})(Image.new("RGB", (50, 40)), threshold=0.0))
detect = pipeline("object-detection", "retinanet_resnet", trust_remote_code={remote})
assert len(detect(Image.new("RGB", (50, 40)), threshold=0.0)) == 5
"""
WITHOUT = SCRIPT.format(preamble='sys.modules["cankd_hf"] = None', remote=True, home="transformers_modules")
WITH = SCRIPT.format(preamble="import cankd_hf", remote=False, home="cankd_hf")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind, a batch, and the loss and logits that it should give."""
    folder = tmp_path_factory.mktemp("saved")
    cases = {}
    for kind in (*DETECTORS, "dino"):
        model = dino(d_model=64) if kind == "dino" else detector(kind, score_threshold=0.0, max_detections=5)
        model.eval()
        model.save_pretrained(folder / kind)
        size = {"shortest_edge": 48, "longest_edge": 64}
        DeformableDetrImageProcessor(size=size).save_pretrained(folder / kind)
        images, labels = pictures()
        with torch.no_grad():
            output = model(images, labels=labels)
        cases[kind] = (images, labels, output.loss, output.logits)
    torch.save(cases, folder / "cases.pt")
    masked = {}
    for kind in KINDS:
        student_of_masks = student(kind, score_threshold=0.0, max_detections=4).eval()
        student_of_masks.save_pretrained(folder / f"masked_{kind}")
        images, labels = outlined_pictures(64, 96)
        with torch.no_grad():
            output = student_of_masks(images, labels=labels)
        masked[f"masked_{kind}"] = (images, labels, output.loss, output.pred_masks)
    torch.save(masked, folder / "masked.pt")
    return folder


@pytest.mark.parametrize(
    "script", [WITHOUT, pytest.param(WITH, marks=pytest.mark.slow)], ids=["without cankd_hf", "with import cankd_hf"]
)
def test_every_detector_loads_in_a_fresh_process(script: str, saved: Path) -> None:
    done = forked(["-c", script], cwd=saved)
    assert done.returncode == 0, done.stderr[-3000:]
    # Without cankd_hf a pipeline says so of every class it has no entry for, and runs it all the same.
    assert script != WITH or "is not supported for" not in done.stderr
