"""A folder for each test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder with a name that is hard to read."""
    (tmp_path / "Meine Zellen é").mkdir()
    return tmp_path / "Meine Zellen é"
