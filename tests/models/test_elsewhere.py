"""Students in a fresh process: without cankd_hf (remote code), and with nothing but `import cankd_hf`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import SegformerImageProcessor

from cankd_hf.models.students import StudentConfig, build_student
from tests.processes import forked

from .kinds import CONVNEXT, FPN_KINDS, KINDS, RESNET, student

HEAD = """
import sys, torch
from PIL import Image
{preamble}
from transformers import AutoModelForSemanticSegmentation, pipeline, ResNetBackbone, ConvNextBackbone
cases = torch.load("cases.pt")
for kind, (images, logits) in cases.items():
    {options}
    model = AutoModelForSemanticSegmentation.from_pretrained(kind, **options)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=images).logits, logits)
    home = type(model).__module__.split(".")[0]
    assert home == {home}, (kind, type(model))
"""
WITHOUT = (
    HEAD.format(
        preamble='sys.modules["cankd_hf"] = None  # whoever imports it gets an ImportError',
        options="options = {} if kind in {natives} else {'trust_remote_code': True}".replace(
            "{natives}", "('segformer', 'upernet', 'mobilenet_v2')"
        ),
        home="('transformers' if not options else 'transformers_modules')",
    )
    + """
for kind in ("resnet_fpn", "segformer"):
    found = pipeline("image-segmentation", kind, trust_remote_code=kind == "resnet_fpn")(Image.new("RGB", (50, 40)))
    assert all(segment["mask"].size == (50, 40) for segment in found)
try:
    AutoModelForSemanticSegmentation.from_pretrained("resnet_fpn", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("a student of ours loaded without code")
for cls, folder in ((ResNetBackbone, "bare_resnet"), (ConvNextBackbone, "bare_convnext")):
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
"""
)
WITH = (
    HEAD.format(
        preamble="import cankd_hf",
        options="options = {}",
        home="('cankd_hf' if kind not in ('segformer', 'upernet', 'mobilenet_v2') else 'transformers')",
    )
    + """
pipeline("image-segmentation", "resnet_fpn")(Image.new("RGB", (50, 40)))
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
"""
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind, an image and the logits that it should give, and two bare backbones."""
    folder = tmp_path_factory.mktemp("saved")
    cases = {}
    for kind in KINDS:
        model = student(kind).eval()
        model.save_pretrained(folder / kind)
        SegformerImageProcessor(size={"height": 48, "width": 64}).save_pretrained(folder / kind)
        images = torch.randn(1, 3, 70, 50)
        with torch.no_grad():
            cases[kind] = (images, model(pixel_values=images).logits)
    torch.save(cases, folder / "cases.pt")
    for name, fields in (("bare_resnet", RESNET), ("bare_convnext", CONVNEXT)):
        build_student(StudentConfig(backbone={**fields, "out_indices": [3, 4]}), None, {}).save_pretrained(
            folder / name
        )
    return folder


@pytest.mark.parametrize(
    "script", [WITHOUT, pytest.param(WITH, marks=pytest.mark.slow)], ids=["without cankd_hf", "with import cankd_hf"]
)
def test_every_student_loads_in_a_fresh_process(script: str, saved: Path) -> None:
    assert FPN_KINDS
    done = forked(["-c", script], cwd=saved)
    assert done.returncode == 0, done.stderr[-3000:]
    # Without cankd_hf a pipeline says so of every class it has no entry for, and runs it all the same.
    assert script != WITH or "is not supported for" not in done.stderr
