"""What this machine leaves to one process, and the number of CPU threads that follows. Imports no torch.

A parallel region ends when its last thread does. Where other programs keep cores busy, that thread may wait for a
core while the others spin in OpenMP's barrier: steps of a small model then take seconds instead of milliseconds
(docs/scaling.md has the measurements).
"""

import ctypes
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

# Environment variables by which the number of threads is set, and those for how threads wait.
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Launchers that set OMP_NUM_THREADS=1 where nobody did -> a variable by which they are known.
_LAUNCHERS = {"torchrun": "TORCHELASTIC_RUN_ID", "accelerate launch": "ACCELERATE_MIXED_PRECISION"}
_SHARED = 0.5  # of a core in other programs' use, from which on there is one less for us


@dataclass(frozen=True)
class Host:
    """What one process finds.

    Attributes:
        cores: cores it may use, by affinity and by the quota of its cgroup; at least 1.
        others: cores that other programs used when they were measured, 0 to `cores`.
        processes: processes of the same run on this machine.
        asked: the environment variable that sets the number of threads, such as `OMP_NUM_THREADS=2`.
        waits: the variable that sets how threads wait, such as `OMP_WAIT_POLICY=active`.
    """

    cores: int
    others: float = 0.0
    processes: int = 1
    asked: str | None = None
    waits: str | None = None

    @property
    def shared(self) -> bool:
        """Whether other programs use so much that there is at least one core less for this process."""
        return self.processes == 1 and self.others >= _SHARED

    def threads(self, workers: int = 0) -> int:
        """Threads that find a core each, beside `workers` loading processes, which get up to half of the cores."""
        if self.processes > 1:
            return max(1, self.cores // self.processes)
        free = max(1, math.ceil(self.cores - self.others - _SHARED))
        return max(1, free - min(workers, free // 2))


def read_host(environ: Mapping[str, str] = os.environ, seconds: float = 0.2) -> Host:
    """Reads the environment, and measures for `seconds` what other programs use where it matters."""
    counts = [name for name in COUNTS if _number(environ.get(name, "").partition(",")[0])]  # a list is of nested ones
    asked = next((f"{name}={environ[name]}" for name in counts), None)
    waits = next((f"{name}={environ[name]}" for name in WAITS if environ.get(name)), None)
    if asked is not None:
        setter = next((name for name, mark in _LAUNCHERS.items() if mark in environ), None)
        asked += f", which {setter} sets where nobody else does" if setter and asked == "OMP_NUM_THREADS=1" else ""
    processes = _number(environ.get("LOCAL_WORLD_SIZE", "")) or 1
    cores = usable_cores()
    alone = asked is None and processes == 1 and cores > 1
    return Host(cores, Load().others(cores, seconds) if alone else 0.0, processes, asked, waits)


def _number(text: str) -> int:
    """The whole number in a text; 0 for any other text, which OpenMP leaves aside."""
    return int(text) if text.strip().isdecimal() else 0


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt, in malloc.h


def keep_memory(environ: Mapping[str, str] = os.environ) -> bool:
    """Makes glibc's allocator keep freed memory for the next tensor, for a process of a command.

    By default each large block goes back to the system when it is freed, and comes back as pages that have to be made
    and zeroed: a quarter of the CPU time of a small student's step. The peak of the memory in use grows by some 3%
    (docs/performance.md). Results do not depend on it.

    Returns:
        Whether it does now: not on systems without glibc, nor where the environment sets the allocator.
    """
    told = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in environ)
    if sys.platform != "linux" or told:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = any(mallopt(_MMAP_THRESHOLD, size) for size in (2**30, 2**25))  # the larger one where it is taken
    return kept and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def wait_passively(host: Host) -> bool:
    """Makes OpenMP's threads sleep in barriers where cores are shared, unless the user set how they wait.

    It must come before torch is imported, which reads this once. Results do not depend on it.
    """
    if not host.shared or host.waits is not None or "torch" in sys.modules:
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True


def usable_cores(root: Path = Path("/")) -> int:
    """Cores in this process's affinity, or the whole cores of its cgroup's quota if that is less; at least 1."""
    return max(1, int(min(len(_affinity()), cgroup_quota(root))))


def _affinity() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cgroup_quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the process's cgroup and those above it allow, of version 2 and 1; inf without one."""
    return min((_quota(folder) for folder in _cgroups(root)), default=math.inf)


def _cgroups(root: Path) -> list[Path]:
    """The folders of the process's own cgroup and of those above it; inside a container only the last is there."""
    mount, table = root / "sys/fs/cgroup", root / "proc/self/cgroup"
    found = [mount, mount / "cpu", mount / "cpu,cpuacct"]
    for line in _text(table).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "" or "cpu" in controllers.split(","):
            base, parts = mount / controllers, Path(path.lstrip("/")).parts
            found += [base.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return list(dict.fromkeys(found))


def _quota(folder: Path) -> float:
    quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:  # no such system, or no such controller
        return ""


class Load:
    """What other programs use, since it was made or last asked."""

    def __init__(self) -> None:
        self._then = self._now()

    def others(self, cores: int, seconds: float = 0.0) -> float:
        """Cores used by other programs than this process and its children, at our priority, 0 to `cores`.

        Args:
            cores: usable ones; of a quota smaller than the machine, as much as the machine cannot give is counted.
            seconds: to wait for first.
        """
        if seconds:
            time.sleep(seconds)
        before, self._then = self._then, self._now()
        (start, busy, own), (end, busy_now, own_now) = before, self._then
        if end <= start:
            return 0.0
        used = max(0.0, ((busy_now - busy) - (own_now - own)) / (end - start))
        return min(float(cores), max(0.0, used - (len(_affinity()) - cores)))

    def age(self) -> float:
        """Seconds since it was made or last asked."""
        return time.perf_counter() - self._then[0]

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """The clock; the CPU seconds of all on the usable cores; those of this process and its children."""
        per_core, usable = psutil.cpu_times(percpu=True), _affinity()
        times = [core for number, core in enumerate(per_core) if number in usable] or per_core
        # Without what runs at lower priority, which gives way.
        busy = sum(
            core.user + core.system + getattr(core, "irq", 0.0) + getattr(core, "softirq", 0.0) for core in times
        )
        return time.perf_counter(), busy, family_seconds()


def family_seconds() -> float:
    """User and system CPU seconds of this process and its children, those that have ended included."""
    own = psutil.Process()
    ended = own.cpu_times()
    waited = getattr(ended, "children_user", 0.0) + getattr(ended, "children_system", 0.0)
    return time.process_time() + waited + sum(map(_cpu_seconds, own.children(recursive=True)))


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended
        return 0.0
    return float(times.user + times.system)


def cpu_bf16() -> bool:
    """Whether the CPU multiplies matrices in bf16 by its own instructions."""
    import torch

    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    arm = getattr(torch.cpu, "_is_arm_bf16_supported", None)
    return any(ask() for ask in [*known, arm] if ask is not None)
