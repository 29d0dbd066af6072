"""Whatever a command raises: lines without a traceback, an exit code, and a private file with the traceback."""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.commands import exit_code
from cankd_hf.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "a1B2" * 9
# Command -> its module, its words, and a function that it calls.
COMMANDS = {
    "train": ("cankd_hf.train", ["x.yaml"], "cankd_hf.runs.recipe.load_recipe"),
    "evaluate": ("cankd_hf.evaluate", ["folder"], "cankd_hf.config.reading.load_data_config"),
    "push": ("cankd_hf.push", ["folder", "me/name"], "cankd_hf.hub.upload.plan"),
    "export": ("cankd_hf.export", ["folder", "--format", "torch-export"], "cankd_hf.export.command.run"),
    "probe": ("cankd_hf.probe", ["model", "folder"], "cankd_hf.probe.command.run"),
    "label": ("cankd_hf.label", ["teacher", "folder"], "cankd_hf.label.command.run"),
    "visualize": ("cankd_hf.visualize", ["folder"], "cankd_hf.visualize.session.visualize"),
    "benchmark loss": ("cankd_hf.benchmark", ["loss"], "cankd_hf.benchmark.loss.run"),
    "benchmark step": ("cankd_hf.benchmark", ["step", "x.yaml"], "cankd_hf.runs.recipe.load_recipe"),
    "benchmark teacher": ("cankd_hf.benchmark", ["teacher", "x.yaml"], "cankd_hf.runs.recipe.load_recipe"),
}


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the log files."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("CANKD_DEBUG", raising=False)
    return folder


def test_an_output_that_cannot_hold_a_letter_gets_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert exit_code(lambda: print("mü ─") or 0) == 0
    assert written.getvalue().decode("unicode_escape") == "mü ─\n"


def test_a_deleted_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_code(lambda: 0) == 2 and "was deleted; go to one that is there" in capsys.readouterr().err


def failing(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return err.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unexpected_exception_is_one_line_with_place_and_log(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logs: Path
) -> None:
    module, words, called = COMMANDS[command]
    main = importlib.import_module(module).main
    monkeypatch.setattr(called, failing(KeyError(f"several\nlines and {TOKEN}")))
    assert main(words) == 1
    (line,) = told(capsys)
    assert re.match(r"error: KeyError: .*several.*\(at cankd_hf/[\w/]+\.py:\d+\); .*open an issue with", line), line
    (log,) = logs.glob("cankd_hf-*.log")
    assert str(log) in line
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and "KeyError" in text
    assert TOKEN not in line + text
    monkeypatch.setenv("CANKD_DEBUG", "1")
    with pytest.raises(KeyError):
        main(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_interrupts_and_full_disks(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logs: Path
) -> None:
    module, words, called = COMMANDS[command]
    main = importlib.import_module(module).main
    monkeypatch.setattr(called, failing(InputError(["a: bad", f"b: {TOKEN}"])))
    assert (main(words), told(capsys)) == (2, ["error: a: bad", "error: b: ***"])
    monkeypatch.setattr(called, failing(KeyboardInterrupt()))
    assert main(words) == 130
    assert told(capsys)[0].startswith("Interrupted; ")
    assert not list(logs.glob("*.log"))
    monkeypatch.setattr(called, failing(OSError(errno.ENOSPC, "No space left on device", "file")))
    assert main(words) == 1
    (line,) = told(capsys)
    assert "No space left on device" in line and "free space on the disk" in line
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    "name", ["train", "evaluate", "push", "export", "label", "probe", "visualize", "benchmark", "compare"]
)
def test_the_help_names_the_exit_codes_and_usage_errors_hide_tokens(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(f"cankd_hf.{name}").main
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "exit codes: 0" in shown and "Further exit codes: 1 " in shown
    with pytest.raises(SystemExit) as left:
        main(["loss" if name == "benchmark" else "x", "--token", TOKEN, "--nonsense"])
    assert left.value.code == 2
    assert TOKEN not in capsys.readouterr().err


def test_an_import_that_ctrl_c_breaks_off_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy failed to import") from error

    assert exit_code(broken, "all is well") == 130
    assert told(capsys) == ["Interrupted; all is well."]


def test_out_of_memory_and_a_log_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert exit_code(failing(MemoryError())) == 1
    (line,) = told(capsys)
    assert line.startswith("error: MemoryError (at ") and "make batches, images or the model smaller" in line
    assert "could not be written" in line and "CANKD_DEBUG=1" in line


def test_of_several_processes_each_but_the_first_says_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert exit_code(failing(InputError(["a: bad", "b: bad"]))) == 2
    assert told(capsys) == ["process 3: error: a: bad (and 1 more)"]
    assert exit_code(failing(KeyboardInterrupt())) == 130
    assert told(capsys) == []


@pytest.fixture
def script(tmp_path: Path) -> Iterator[list[str]]:
    """A command that prints for ever, in a temporary folder of its own."""
    file = tmp_path / "script.py"
    file.write_text(
        "import sys, tempfile, time\n"
        "from cankd_hf.commands import exit_code\n"
        "def run():\n"
        "    with tempfile.TemporaryDirectory(dir=sys.argv[1]):\n"
        "        for n in range(10**6):\n"
        "            print('line', n, flush=n < 2)\n"
        "            if sys.argv[2:] and n == 2: time.sleep(60)\n"
        "    return 0\n"
        "sys.exit(exit_code(run, 'nothing was lost'))\n"
    )
    (tmp_path / "work").mkdir()
    yield [sys.executable, str(file), str(tmp_path / "work")]


def started(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_reader_that_leaves_ends_the_command_quietly(script: list[str], tmp_path: Path) -> None:
    process = started(script)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)
    assert not list((tmp_path / "work").iterdir())


def test_sigterm_unwinds_the_command(script: list[str], tmp_path: Path) -> None:
    process = started([*script, "wait"])
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (errors, process.returncode) == ("Terminated; nothing was lost.\n", 143)
    assert not list((tmp_path / "work").iterdir())
