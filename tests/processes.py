"""Two processes on one machine, for tests of what they compute together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Of a process that imports this checkout and keeps to one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_two(script: Path, *arguments: object) -> None:
    """Runs a script by torchrun in two processes; a failure of either fails the test with what it said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]


def leave_together(folder: Path, rank: int) -> None:
    """Ends the process once both are done, without gloo's teardown: the first to leave can abort the other in it."""
    (folder / f"done{rank}").touch()
    end = time.monotonic() + 60
    while not (folder / f"done{1 - rank}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
