"""The stand-in for the Hub, and processes whose Hub it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .stand_in import TOKEN, Hub, running_hub

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A Hub on this machine, empty but for somebody else's model."""
    with running_hub() as running:
        yield running


@pytest.fixture(scope="session")
def python(hub: Hub) -> Callable[..., str]:
    """Runs Python in a fresh process (the client reads its variables once) and returns what it printed."""

    def run(*words: str, cwd: Path) -> str:
        own = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(cwd / "hf_home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, *words], env={**os.environ, **own}, cwd=cwd, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run
