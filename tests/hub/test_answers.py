"""Stored answers of a teacher from a data set on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .stand_in import TOKEN, Hub, Repo

CODE = """
import shutil, sys
from pathlib import Path
from cankd_hf.config.teacher import CacheConfig, TeacherConfig
from cankd_hf.teachers.load import load_teacher
from tests.training.tiny_trainers import dinov2, trainer

def run(name, **cache):
    cache = CacheConfig(views=2, folder=str(Path(sys.argv[1]) / name), **cache)
    teacher = load_teacher(TeacherConfig(config=dinov2(), cache=cache), seed=1)
    made = trainer(Path(sys.argv[1]) / "run", teacher=teacher)
    made.train()
    facts = made.cache_facts()["teacher"]
    print(name, facts["hits"], facts["misses"])

run(sys.argv[2], **({"repo": sys.argv[3]} if len(sys.argv) > 3 else {}))
"""


@pytest.mark.slow  # two processes that import everything
def test_answers_are_pulled_before_any_is_computed(hub: Hub, python: Callable[..., str], tmp_path: Path) -> None:
    assert "own 0 16" in python("-c", CODE, str(tmp_path), "own", cwd=tmp_path)
    files = {
        path.relative_to(tmp_path / "own").as_posix(): path.read_bytes() for path in (tmp_path / "own").rglob("*.*")
    }
    hub.repos["me/answers"] = Repo(private=True, branches={"main": [{**files, "other/header.json": b"{}"}]})
    assert "pulled 16 0" in python("-c", CODE, str(tmp_path), "pulled", "me/answers", cwd=tmp_path)
    assert not (tmp_path / "pulled" / "other").exists(), "those of other teachers stay there"
    assert not any(TOKEN in path.read_text("latin-1") for path in (tmp_path / "pulled").rglob("*") if path.is_file())
