"""Other processes of this machine, for tests of commands that are started and of what two compute together.

They are forks of one process that has imported the libraries, but nothing of `cankd_hf`: each test would pay for these
imports again, more than for what it tests.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = ["torch", "torchvision", "timm", "datasets", "scipy.optimize", "scipy.ndimage", "matplotlib.figure"]
FORKS.set_forkserver_preload([*LIBRARIES, "evaluate", "peft", "accelerate", "transformers.trainer"])


def environment() -> dict[str, str]:
    """Of a process that imports this checkout and keeps to one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Forked:
    """`python WORDS` (`-m MODULE`, `-c CODE` or a script, with arguments), begun in a fork; its output is in `out` and
    `err`."""

    def __init__(self, words: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
        self.words = [str(word) for word in words]
        self.folder = Path(tempfile.mkdtemp(prefix="cankd-forked-"))
        self.out, self.err = self.folder / "out", self.folder / "err"
        settings = {**environment(), **(env or {})}
        self.process = FORKS.Process(target=_run, args=(self.words, str(cwd), settings, str(self.out), str(self.err)))
        self.process.start()

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_for(self, words: str, file: str = "out", seconds: float = 120) -> str:
        """The first line with these words of what it prints."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = self.process.is_alive()
            written = getattr(self, file)
            for line in written.read_text().splitlines() if written.is_file() else ():
                if words in line:
                    return line
            assert alive, f"ended without {words!r}: {self.err.read_text()[-3000:]}"
            time.sleep(0.02)
        raise AssertionError(f"no {words!r} after {seconds:g} s")

    def wait(self, seconds: float = 280) -> CompletedProcess[str]:
        """Waits for its end, which it may have to be brought to."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        assert code is not None
        return CompletedProcess(self.words, code, self.out.read_text(), self.err.read_text())


def _run(words: list[str], cwd: str, settings: dict[str, str], out: str, err: str) -> None:
    """The fork's own part: what `python WORDS` does."""
    gc.freeze()  # as in conftest
    multiprocessing.set_start_method(None, force=True)  # its own workers start as those of any process
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(settings)
    os.chdir(cwd)
    first = cwd if words[0] in ("-m", "-c") else str(Path(words[0]).parent)
    sys.path[:0] = [first, *settings["PYTHONPATH"].split(":")]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def forked(words: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """Runs `python WORDS` in a fork to its end."""
    return Forked(words, cwd, env).wait()


def run_two(*words: object) -> list[CompletedProcess[str]]:
    """Runs a script or `-m MODULE` in two processes as torchrun does; a failure of either fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    ranks = [Forked(words, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    end = time.monotonic() + 280
    while any(rank.process.is_alive() for rank in ranks) and time.monotonic() < end:
        if any(rank.process.exitcode for rank in ranks):  # the other one would wait for it for ever
            time.sleep(1)
            break
        time.sleep(0.02)
    done = [rank.wait(0) for rank in ranks]
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stderr[-3000:] for one in done)
    return done


def leave_together(folder: Path, rank: int) -> None:
    """Ends the process once both are done, without gloo's teardown: the first to leave can abort the other in it."""
    (folder / f"done{rank}").touch()
    end = time.monotonic() + 60
    while not (folder / f"done{1 - rank}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
