"""A student on the Hub is looked at by its id, from a process that has nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

STUDENT = Path(__file__).parents[1] / "data" / "camvid_student"
SCRIPT = """
import sys
from PIL import Image
from cankd_hf import push, visualize
assert push.main([sys.argv[1], "me/looked-at"]) == 0
Image.effect_noise((96, 72), 60).save("noise.png")
assert visualize.main(["me/looked-at", "--images", "noise.png"]) == 0
assert visualize.main(["me/not-there", "--images", "noise.png"]) == 2
"""


@pytest.mark.slow
def test_a_student_is_looked_at_by_its_id(python: Callable[..., str], tmp_path: Path) -> None:
    shown = python("-c", SCRIPT, str(STUDENT), cwd=tmp_path)
    assert "note: There is no distiller.safetensors" in shown
    found = sorted(file.name for file in (tmp_path / "visualize" / "looked-at").iterdir())
    assert found == ["1_noise_heat.png", "1_noise_pca.png", "report.html"]
