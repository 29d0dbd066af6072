"""Every example runs as it stands, with a few steps in place of its forty."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
# These take longest; the others cover the same road for every change.
SLOW = {"detection", "export_student", "image_folder", "phases", "push_student", "several_teachers"}


def cases() -> list[object]:
    return [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW)) for path in EXAMPLES]


@pytest.mark.parametrize("path", cases())
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, changed = re.subn("^STEPS = 40$", "STEPS = 2", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert changed == 1
    code = re.sub(r'report_to="none"', 'report_to="none", use_cpu=True, disable_tqdm=True', code)
    exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "an example shows what came of it"


def test_examples_are_short_and_begin_with_what_they_show() -> None:
    assert len(EXAMPLES) >= 10
    for path in EXAMPLES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 40 and lines[0].startswith('"""') and lines[0].endswith('."""'), path.name
