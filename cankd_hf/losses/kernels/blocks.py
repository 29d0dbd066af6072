"""Cutting maps into blocks that stay in a cache, so that temporaries never grow with the map, and running them.

On the CPU the blocks are shared out to threads of our own, each of which computes alone. One parallel region for each
operation, as torch has them, waits for its slowest thread hundreds of times in a loss: on cores that other processes
use too, that is most of the time. Here threads meet once in a pass, and take the next piece when they are free.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache, wraps
from typing import Any, NamedTuple

import torch

# Values of one map handled at once. On the CPU, for each thread: a block and its temporaries should stay in the cache
# of a core. On a GPU a block should fill the device while its temporaries stay small beside the maps (not measured).
BLOCK_CPU = 1 << 17
BLOCK_GPU = 1 << 21
BLOCKWISE = frozenset({"cpu"})  # devices on which losses compute block by block
MAX_THREADS = 16  # more would wait for the interpreter; then torch's threads share each operation
PIECES = 4  # for each thread, so that one on a busy core does less; fewer where they would be small

Where = tuple[slice, slice]
_outside = threading.local()  # `threads`: torch's number around `alone`, 0 outside of it


class Piece(NamedTuple):
    """Blocks that one thread computes one after the other.

    Attributes:
        number: of the piece among all.
        slot: number of the piece among those of the same images: sums over units are kept for each slot.
        blocks: (images, units) of each block.
    """

    number: int
    slot: int
    blocks: list[Where]


class Cut(NamedTuple):
    """A map in pieces; `slots` is the largest number of pieces of one image."""

    pieces: list[Piece]
    slots: int


def on_whole_maps(device: torch.device) -> bool:
    """Whether losses compute on whole maps, in few operations: on devices where each operation is a launch."""
    return device.type not in BLOCKWISE


def cut(device: torch.device, batch: int, length: int, width: int, kept: int = 0) -> Cut:
    """Cut [batch, length] units of `width` values each into pieces of blocks.

    Args:
        device: where the map is.
        batch: images.
        length: units of an image: positions or rows.
        width: values of a unit.
        kept: values of the sums that each piece keeps: their memory stays small beside the map.
    """
    total = batch * length * width
    count, values = _pieces(device, total, kept), BLOCK_CPU
    if device.type != "cpu" or torch.compiler.is_compiling():
        # a compiled loop is unrolled into the graph: a few large blocks
        values = max(BLOCK_GPU, total // 4)
    slots = min(-(-count // batch), length)
    images = max(1, batch // count)
    pieces: list[Piece] = []
    for first in range(0, batch, images):
        last = min(first + images, batch)
        for slot, units in enumerate(_evenly(0, length, slots)):
            pieces.append(Piece(len(pieces), slot, list(_blocks(first, last, units, width, values))))
    return Cut(pieces, slots)


def run(made: Cut, work: Callable[[Piece, Where], None]) -> None:
    """`work(piece, block)` for each block, without gradients; returns when all are done.

    Results do not depend on which thread computes which piece, as long as each piece writes into places of its own.
    After an error no thread begins another piece, and it is raised when all have stopped.
    """
    threads = 1 if torch.compiler.is_compiling() or _watched() else _threads()
    if len(made.pieces) == 1 or threads == 1:
        with alone():
            for piece in made.pieces:
                for where in piece.blocks:
                    work(piece, where)
        return
    waiting, inference = deque(made.pieces), torch.is_inference_mode_enabled()

    def take() -> None:
        # modes of gradients belong to a thread
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                for where in piece.blocks:
                    work(piece, where)

    others = _begin(take, threads - 1)
    try:
        with alone():
            take()
    finally:
        waiting.clear()
        # a thread that has not begun by now has nothing left to do
        begun = [other for other in others if not other.cancel()]
        wait(begun)
    for other in begun:
        other.result()


def _watched() -> bool:
    """Whether something sees the operations of the calling thread alone: a dispatch mode, a functorch transform."""
    watching: bool = torch._C._len_torch_dispatch_stack() > 0
    return watching or torch._C._functorch.peek_interpreter_stack() is not None


def _begin(take: Callable[[], None], workers: int) -> list[Future[None]]:
    """`take` on that many other threads; on none where the process may start no more, as when it ends."""
    others: list[Future[None]] = []
    with suppress(RuntimeError):
        pool = _pool(os.getpid(), workers)
        for _ in range(workers):
            others.append(pool.submit(take))
    return others


@contextmanager
def alone() -> Iterator[None]:
    """Operations within use the calling thread only, but for `run`, which has as many as there were outside.

    After a parallel region torch's threads stay awake for milliseconds, on cores that `run` then has to share.
    """
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    if not 1 < threads <= MAX_THREADS:
        yield
        return
    _outside.threads = threads
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
        _outside.threads = 0


def alone_but_for_run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the passes of an autograd function, which then run within `alone`."""

    @wraps(function)
    def inside(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        with alone():
            return function(*args)

    return inside


def _threads() -> int:
    """Threads for `run`: those outside of `alone`."""
    return getattr(_outside, "threads", 0) or torch.get_num_threads()


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads that compute alone, of one process: a forked one has none of its parent's."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cankd", initializer=torch.set_num_threads, initargs=(1,))
    # all have begun before any is used: the last number set anywhere is that of threads which torch itself starts
    begun = threading.Barrier(workers + 1)
    try:
        for _ in range(workers):
            pool.submit(begun.wait)
        begun.wait()
    except BaseException:
        begun.abort()  # those that wait would keep the process from ending
        raise
    return pool


def _pieces(device: torch.device, total: int, kept: int) -> int:
    """How many pieces to make of a map of `total` values."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return 1
    threads = _threads()
    if not 1 < threads <= MAX_THREADS:
        return 1
    smallest = max(BLOCK_CPU, 8 * kept)
    count = min(PIECES * threads, total // smallest)
    # a map too small for all threads is computed by one: they would wait longer than they work
    return max(count, threads) if total >= BLOCK_CPU // 2 else 1


def _blocks(first: int, last: int, units: slice, width: int, values: int) -> Iterator[Where]:
    """Blocks of about `values` values of images first to last, units of equal size."""
    length = units.stop - units.start
    count = max(1, round(length * width / values))
    images = max(1, values // (length * width)) if count == 1 else 1
    for image in range(first, last, images):
        for part in _evenly(units.start, units.stop, count):
            yield slice(image, min(image + images, last)), part


def _evenly(start: int, stop: int, count: int) -> list[slice]:
    """Cut a range into `count` of equal length, up to one."""
    count = min(count, stop - start)
    ends = [start + (stop - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
