"""A run that is killed, stopped or out of space ends as an uninterrupted one when the same command is called again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import Forked


def run_trials(folder: Path, *kinds: str, timeout: float) -> list[dict]:
    done = Forked(["-m", "tests.survival.trials", folder, *kinds]).wait(timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 1 + sum(int(kind.partition(":")[2]) for kind in kinds)
    wrong = [trial for trial in found[1:] if trial["wrong"]]
    assert not wrong, json.dumps(wrong, indent=1)
    return found[1:]


def test_a_run_survives_a_kill_and_a_full_disk(tmp_path: Path) -> None:
    found = run_trials(tmp_path, "kill:1", "size:1", timeout=280)
    assert sum(trial["codes"][0] != 0 for trial in found) >= 1, "too few were interrupted at all"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "kinds", ["kill:60", "SIGKILL:40", "SIGINT:6 SIGTERM:6 SIGINTx2:6 SIGTERMx2:6", "full:20 size:10"]
)
def test_a_run_survives_everything(kinds: str, tmp_path: Path) -> None:
    run_trials(tmp_path, *kinds.split(), timeout=3500)
