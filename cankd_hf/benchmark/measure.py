"""Clocks, memory, limits of the machine, and tables."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

Run = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Machine:
    """Peak rates of the device, measured in this process."""

    name: str
    flops: float  # floating point operations per second of a matrix product: float32, on a GPU the maps' type
    bandwidth: float  # bytes per second read plus written by a copy

    def floor(self, flops: float, size: float) -> float:
        """Lower bound in seconds of a step: the longer of computing and moving `size` bytes, perfectly overlapped."""
        return max(flops / self.flops, size / self.bandwidth)


def synchronise(device: torch.device) -> None:
    """Waits for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: Sequence[Run], repeats: int, device: torch.device, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Seconds of several runs taken in turn after one warm-up each, so that other load affects all of them alike.

    The clock is wall-clock, or `time.process_time` on a CPU that other processes use too.
    """
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for index, run in enumerate(runs):
            synchronise(device)
            start = clock()
            run()
            synchronise(device)
            times[index].append(clock() - start)
    return times


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keeps `count` processes busy meanwhile. They end with this process, whatever ends it: their input closes."""
    code = "import sys, threading, os; threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()\n"
    children = [
        subprocess.Popen([sys.executable, "-c", code + "while True: pass"], stdin=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()


def cpu_of(run: Run, into: list[float]) -> Run:
    """The same run, which also notes its user + system seconds, of all threads of this process."""

    def noted() -> None:
        start = time.process_time()
        run()
        into.append(time.process_time() - start)

    return noted


def against_plain(ours: Run, plain: Run, repeats: int, device: torch.device, name: str) -> tuple[float, list[str]]:
    """The ratio of the plain form's seconds to ours, and a row of a table: name, both times, ratio.

    CPU time of one thread on the CPU, wall-clock on an accelerator.
    """
    fast, slow = interleaved(
        [ours, plain], repeats, device, time.process_time if device.type == "cpu" else time.perf_counter
    )
    ratio = statistics.median(two / one for one, two in zip(fast, slow, strict=True))
    return ratio, [name, f"{min(fast):.2f} s", f"{min(slow):.2f} s", f"{ratio:.1f}x"]


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> Table:
    """A table for the console, its first `left` columns aligned to the left and the others to the right."""
    made = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def peak_extra(run: Run, device: torch.device) -> int:
    """Largest number of bytes that torch allocated during a run, beyond what was allocated before it.

    On the CPU of a run on one thread; each further thread adds the temporaries of a block.
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the profiler sees no memory of the threads that losses start
    try:
        with (
            _without_stderr(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            run()
    finally:
        torch.set_num_threads(threads)
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
    """Drops what native code writes to stderr: the profiler announces every use of it there."""
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
    """Bytes that can be allocated without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return 8 << 30
    kib = next(line.split()[1] for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(kib) * 1024


def this_machine(
    device: torch.device, repeats: int = 15, clock: Clock = time.perf_counter, dtype: torch.dtype = torch.float32
) -> Machine:
    """Measures the matrix rate and the copy bandwidth: the best of several, as they are upper limits."""
    on_gpu = device.type == "cuda"
    size, values = (8192, 1 << 28) if on_gpu else (1024, 1 << 24)  # larger than the caches
    a, b = (torch.randn(size, size, device=device).to(dtype if on_gpu else torch.float32) for _ in range(2))
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    product, copy = interleaved([lambda: torch.mm(a, b), lambda: target.copy_(source)], repeats, device, clock)
    if on_gpu:
        name = torch.cuda.get_device_name(device)
    else:
        name = (
            f"{platform.machine()} CPU, {torch.get_num_threads()} threads ({torch.backends.cpu.get_cpu_capability()})"
        )
    return Machine(f"{name}, torch {torch.__version__}", 2 * size**3 / min(product), 8 * source.numel() / min(copy))
