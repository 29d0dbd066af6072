"""Clocks, memory and the machine's own limits."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Machine:
    """What the device can do at best, measured in this process.

    Args:
        name: the machine in words.
        flops: floating point operations a second of a matrix product in float32.
        bandwidth: bytes a second read plus written by a copy.
    """

    name: str
    flops: float
    bandwidth: float

    def floor(self, flops: float, size: float) -> float:
        """Seconds no implementation can beat here: the longer of computing and moving, perfectly overlapped."""
        return max(flops / self.flops, size / self.bandwidth)


def synchronise(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Run, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Time of one run by a clock: wall-clock, or `time.process_time` on a CPU that others use too."""
    synchronise(device)
    start = clock()
    run()
    synchronise(device)
    return clock() - start


def interleaved(
    runs: list[Run], repeats: int, device: torch.device, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Times of several runs taken in turn, so that whatever else the machine does hits all of them alike."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for index, run in enumerate(runs):
            times[index].append(seconds(run, device, clock))
    return times


def peak_extra(run: Run, device: torch.device) -> int:
    """Bytes torch had allocated at once during a run, beyond what was there before it."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _without_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, size in changes:
        now += size
        peak = max(peak, now)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what native code writes to stderr: the profiler announces every use of it there."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated without pushing anything out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return 8 << 30
    kib = next(line.split()[1] for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(kib) * 1024


def this_machine(device: torch.device, repeats: int = 15, clock: Clock = time.perf_counter) -> Machine:
    """Measure the matrix rate and the copy bandwidth: the best of several, as a limit should be."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    source = torch.randn(1 << 24, device=device)
    target = torch.empty_like(source)
    product, copy = interleaved([lambda: torch.mm(a, b), lambda: target.copy_(source)], repeats, device, clock)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = (
            f"{platform.machine()} CPU, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})"
        )
    return Machine(f"{name}, torch {torch.__version__}", 2 * size**3 / min(product), 8 * source.numel() / min(copy))
