"""Random numbers that depend on a seed alone and leave those of the program as they were."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch

_STUDENTS: ContextVar[int | None] = ContextVar("students_seed", default=None)


@contextmanager
def students_seed(seed: int) -> Iterator[None]:
    """Inside, `for_the_student` draws from this seed."""
    token = _STUDENTS.set(seed)
    try:
        yield
    finally:
        _STUDENTS.reset(token)


@contextmanager
def for_the_student() -> Iterator[None]:
    """Inside, torch draws what concerns the student's picture alone: from its own seed, by seed, epoch and sample.

    Geometry and what else the teacher sees are drawn outside of it, from the seed of the view: a stored answer of the
    teacher belongs to one view, which may come again in another epoch, while the student's picture is another one.
    """
    seed = _STUDENTS.get()
    if seed is None:  # a sample that is not read for training
        yield
        return
    with seeded(seed, torch_only=True):
        yield


@contextmanager
def seeded(seed: int, torch_only: bool = False) -> Iterator[None]:
    """Inside, torch (on the CPU), numpy and `random` draw from this seed; afterwards they continue as before.

    Accelerators are left alone: `torch.manual_seed` would start their generators anew too, at each sample.

    Args:
        seed: at least 0; numpy takes its lower 32 bits, torch 63.
        torch_only: numpy and `random` are left alone too, for code that does not draw from them; that takes a
            quarter of the time.
    """
    generator = torch.default_generator
    before = generator.get_state()
    others = None if torch_only else (np.random.get_state(), random.getstate())
    generator.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    if others is not None:
        np.random.seed(seed & 0xFFFF_FFFF)
        random.seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
        if others is not None:
            np.random.set_state(others[0])
            random.setstate(others[1])


def derived_seed(seed: int, *names: object) -> int:
    """A seed of its own for each name: the same in every process and run with `seed`, and equal for no two names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
