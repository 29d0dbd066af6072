"""Where runs are started, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cankd_hf.compare import execute
from cankd_hf.compare.execute import Processes, RunFailed, last_word
from cankd_hf.compare.origin import code_now
from cankd_hf.compare.planning import Run
from cankd_hf.compare.records import Records
from cankd_hf.errors import InputError
from cankd_hf.runs.recipe import load_recipe
from tests.processes import ROOT, environment

from .fake import base


def test_runs_side_by_side_have_a_device_or_their_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "records", tmp_path / "runs")
    monkeypatch.setattr(execute, "visible_devices", lambda: ["3", "5"])
    two = Processes(records, 2)
    assert [two.environment(place)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == ["3", "5"]
    with pytest.raises(InputError, match="at most 2, the number of devices here, got 3"):
        Processes(records, 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    four = Processes(records, 4, costs=False)  # where costs do not count, runs may share a device
    assert [four.environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(4)] == ["3", "5", "3", "5"]
    assert four.environment(0)["OMP_NUM_THREADS"] == "2" and "OMP_NUM_THREADS" not in two.environment(0)
    monkeypatch.setattr(execute, "visible_devices", lambda: [])
    assert Processes(records, 3).environment(0)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in Processes(records, 1).environment(0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Processes(records, 3).environment(0)["OMP_NUM_THREADS"] == "1"


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "records", tmp_path / "runs")
    recipe = load_recipe(base(tmp_path), ["data.path=no/such/folder"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(RunFailed, match="data.path .*expected a folder.* nothing is there .exit code 2; .*abc.log"):
        Processes(records).run(Run("abc", "a run", recipe), 0)
    log = tmp_path / "log"
    log.write_text("error: one\nWarning: later\n")
    assert last_word(log) == "one"
    log.write_text("")
    assert last_word(log) == "it said nothing"


def test_a_run_of_code_that_changed_meanwhile_is_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "records", tmp_path / "runs")
    run = Run("abc", "a run", load_recipe(base(tmp_path)))
    monkeypatch.setattr(Processes, "_start", lambda *_: 0)
    monkeypatch.setattr(execute, "code_now", lambda: "other")
    with pytest.raises(InputError, match="the code changed while a run ran"):
        Processes(records).run(run, 0)
    records.any_code = True
    with pytest.raises(RunFailed, match="its results cannot be read"):
        Processes(records).run(run, 0)


def test_the_hash_of_the_code_does_not_see_comments(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    seen = []
    for text in ("x = 1\n", '"""About x."""\nx = 1  # one\n', "x = 2\n"):
        file.write_text(text)
        seen.append(code_now(tmp_path))
    assert seen[0] == seen[1] != seen[2]


def test_a_child_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os, sys, threading, time\n"
        "from cankd_hf.compare import child\n"
        "threading.Thread(target=child._end_with, args=(int(sys.argv[1]),), daemon=True).start()\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {code!r}, str(os.getpid())], start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
    assert started.stdout is not None
    child = int(started.stdout.readline())
    assert psutil.pid_exists(child)
    started.kill()
    started.wait()
    end = time.monotonic() + 10
    while psutil.pid_exists(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(child)
