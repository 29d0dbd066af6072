"""Checks that a run has the requested number of processes."""

import os

import psutil
import torch

from cankd_hf.errors import InputError


def check_launch(world_size: int) -> None:
    """Raises if there are fewer processes than requested, or several that do not communicate.

    Raises:
        InputError: with a launch command that works.
    """
    fix = (
        "on CPU use `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m cankd_hf.train ...` "
        "or `torchrun --nproc_per_node N -m cankd_hf.train ... training.use_cpu=true`"
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and world_size == 1:
        raise InputError(f"launch: {started} processes were started, but each would train alone (no GPU); {fix}")
    if started == 1 and (asked := _asked_processes()) > 1:
        raise InputError(f"launch: {asked} processes were asked for, but accelerate started 1; {fix}")


def leave_together() -> None:
    """Ends the communication between processes once all are done: the first to exit can abort the others in it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _asked_processes() -> int:
    """The `--num_processes` of the `accelerate launch` that started this process, 1 where there is none."""
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent is not None else []
    if not any("accelerate" in word for word in words[:3]):
        return 1
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            value = value or following
            return int(value) if value.isdigit() else 1
    return 1
