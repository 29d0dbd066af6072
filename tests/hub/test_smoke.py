"""`.ci/hub_smoke`, which needs the real Hub and a token, against the stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Dinov2Config, Dinov2Model, set_seed

from .stand_in import Hub, Repo

SMOKE = Path(__file__).parents[2] / ".ci/hub_smoke"


@pytest.fixture
def teachers(hub: Hub, tmp_path: Path) -> None:
    """A public teacher and a gated one."""
    set_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56)
    Dinov2Model(config).save_pretrained(tmp_path / "teacher")
    files = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    for name, gated in (("open", False), ("gated", True)):
        hub.repos[f"somebody/{name}"] = Repo(private=False, gated=gated, branches={"main": [files]})


@pytest.mark.slow
@pytest.mark.usefixtures("teachers")
def test_the_smoke_script_passes_and_leaves_nothing(hub: Hub, python: Callable[..., str], tmp_path: Path) -> None:
    known = set(hub.repos)
    said = python(str(SMOKE), "--teacher", "somebody/open", "--gated", "somebody/gated", cwd=tmp_path)
    results = [line for line in said.splitlines() if line.startswith(("ok ", "failed "))]
    assert [line.split()[:2] for line in results] == [["ok", "teacher:"], ["ok", "gated:"], ["ok", "push:"]], said
    assert "refused" in results[1] and "deleted" in results[2]
    assert set(hub.repos) == known, "the scratch repository is deleted"


@pytest.mark.network
def test_the_smoke_script_passes_on_the_hub() -> None:
    done = subprocess.run([sys.executable, str(SMOKE)], env={**os.environ, "HF_HUB_OFFLINE": "0"})
    assert done.returncode == 0
