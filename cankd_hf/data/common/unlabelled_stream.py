"""Labelled and unlabelled images in every batch, where one of them is a stream, which is read in its order."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from cankd_hf.config.data import labelled_in
from cankd_hf.data.common.seeds import derived_seed
from cankd_hf.data.common.unlabelled import Visit, WithUnlabelled
from cankd_hf.errors import InputError

TURN = 2**20  # added to the view of a sample with each further pass within an epoch


def with_unlabelled(labelled: Any, unlabelled: Any, ratio: float) -> Any:
    """A training set of both; `labelled` where there is nothing else."""
    if unlabelled is None:
        return labelled
    streamed = any(isinstance(half, IterableDataset) for half in (labelled, unlabelled))
    return (StreamWithUnlabelled if streamed else WithUnlabelled)(labelled, unlabelled, ratio)


class StreamWithUnlabelled(IterableDataset[Any]):
    """What `WithUnlabelled` is for data sets that can be indexed; one of the two may be.

    An epoch ends where both have been read to their end; the shorter one begins anew before, in another order.
    """

    def __init__(self, labelled: Any, unlabelled: Any, ratio: float | None = 1.0) -> None:
        self.labelled, self.unlabelled, self.ratio = labelled, unlabelled, 1.0 if ratio is None else ratio

    def set_epoch(self, epoch: int) -> None:
        for half in (self.labelled, self.unlabelled):
            half.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return iter(SharedOut(self, 2, 0, 1))


class SharedOut(IterableDataset[Any]):
    """The samples of a `StreamWithUnlabelled` for one process, one batch after the other, labelled images first.

    Args:
        dataset: with both halves seeded.
        batch: images in a batch of one process.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(self, dataset: StreamWithUnlabelled, batch: int, rank: int, world: int) -> None:
        self.dataset, self.rank, self.world = dataset, rank, world
        own = labelled_in(batch, dataset.ratio)
        self.parts = own, batch - own

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        halves = (self.dataset.labelled, self.dataset.unlabelled)
        samples = [self._endless(half, part) for half, part in zip(halves, self.parts, strict=True)]
        turns = [0, 0]
        while not all(turns):
            for half, part in enumerate(self.parts):
                for turn, sample in itertools.islice(samples[half], part):
                    turns[half] = turn
                    yield sample

    def _endless(self, half: Any, part: int) -> Iterator[tuple[int, Any]]:
        """The samples of a half for this process, pass after pass, with the number of the pass.

        Where a row is left out, the sample before it comes again: all processes have equally many.
        """
        block = 2 if part % 2 == 0 else 1  # neighbours, which may be mixed, stay in one process
        makes = self._passes(half, part * self.world)
        last, owed = None, 0
        while True:
            group = list(itertools.islice(makes, block * self.world))
            for turn, make in group[block * self.rank : block * (self.rank + 1)]:
                made = make()
                if made is None and last is None:
                    owed += 1
                    if turn:
                        raise InputError(f"data: no image of the stream can be used, {owed} were skipped")
                    continue
                last = last if made is None else made
                yield from [(turn, last)] * (1 + owed)
                owed = 0

    @staticmethod
    def _passes(half: Any, group: int) -> Iterator[tuple[int, Callable[[], Any]]]:
        """For each sample of a half a function that makes it, pass after pass, with the number of the pass."""
        for turn in itertools.count():
            streamed = isinstance(half, IterableDataset)
            passing: Any = half.again(turn) if streamed else _Pass(half, turn, group)  # type: ignore[attr-defined]
            empty = True
            for make in passing.lazily():
                empty = False
                yield turn, make
            if empty:
                worker = get_worker_info()
                raise InputError(
                    "data.unlabelled: expected images for every loading process, got none for one of "
                    f"{worker.num_workers if worker else 1}; set training.dataloader_num_workers to fewer"
                )


class _Pass:
    """One pass over a `SeededDataset` in an order of its own; loading workers take turns at `group` samples."""

    def __init__(self, dataset: Any, turn: int, group: int) -> None:
        self.dataset, self.group, self.view = dataset, group, dataset.epoch + turn * TURN

    def lazily(self) -> Iterator[Callable[[], Any]]:
        """For each sample a function that reads it."""
        worker = get_worker_info()
        generator = torch.Generator().manual_seed(derived_seed(self.dataset.seed, "order", self.view))
        for place, index in enumerate(torch.randperm(len(self.dataset), generator=generator).tolist()):
            if worker is None or place // self.group % worker.num_workers == worker.id:
                yield partial(self.dataset.__getitem__, Visit(index, self.view))
