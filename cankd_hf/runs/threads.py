"""What a command does with the CPU: a number of threads that is chosen once, told in a line, and kept by a run that
goes on; and memory that is kept for the next step."""

from pathlib import Path

import torch

from cankd_hf.host import Host, keep_memory
from cankd_hf.runs.folder import threads_of


def settle_threads(host: Host, out: Path | None = None, workers: int = 0) -> str:
    """Sets torch's number of threads, and says which and why; for a command, which has its process to itself. Freed
    memory is kept, see `keep_memory`.

    Args:
        host: what this process finds.
        out: the folder of a run, which goes on with the number that it began with.
        workers: loading processes.
    """
    keep_memory()
    began = None if out is None else threads_of(out)
    threads, line = choose_threads(host, torch.get_num_threads(), began, workers)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return line


def choose_threads(host: Host, default: int, began: int | None = None, workers: int = 0) -> tuple[int, str]:
    """The number of threads, and the line that says why.

    Args:
        host: what this process finds.
        default: torch's number, which has followed the environment.
        began: that of a run that goes on: sums depend on it in their last bits.
        workers: loading processes.
    """
    if host.asked is not None:
        return default, f"threads: {default} ({host.asked})"
    if began is not None and began <= host.cores:
        return began, f"threads: {began}, as this run began ({_offer(host)}; OMP_NUM_THREADS sets another number)"
    chosen = min(default, host.threads(workers))
    beside = f" beside {workers} loading processes" if chosen < min(default, host.threads()) else ""
    return chosen, f"threads: {chosen} ({_offer(host)}{beside}; OMP_NUM_THREADS sets another number)"


def _offer(host: Host) -> str:
    cores = f"{host.cores} usable core{'s' if host.cores > 1 else ''}"
    if host.processes > 1:
        return f"{cores} for {host.processes} processes"
    if host.shared:
        return f"{cores}, {host.others:.1f} in use by other programs"
    return cores if host.cores == 1 else f"{cores}, free"
