"""Data for several processes: each reads its own samples, and all of them equally many."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from cankd_hf.data.common.batch import Repeated
from cankd_hf.errors import InputError


class StreamShare(IterableDataset):
    """The samples of a stream for one of `world` processes: `block` for the first, as many for the second, ...

    All processes must have equally many batches, because they wait for each other in every step. Where the stream ends
    early for one, it yields another sample as `Repeated`. Of a stream with a method `lazily` each process makes only
    its own samples; any other is read whole by all of them, and must give all of them the same samples in one order.

    Args:
        dataset: the stream.
        rank: number of this process.
        world: number of processes.
        block: samples that follow each other in one process. In evaluation the batch size: batches are then those of
            one process, with the same padding. In training 1: the last batch is spread over all processes.
        whole: if above 0, only full batches of this size are yielded (`dataloader_drop_last`).
    """

    def __init__(self, dataset: Any, rank: int, world: int, block: int = 1, whole: int = 0) -> None:
        self.dataset, self.rank, self.world, self.block, self.whole = dataset, rank, world, block, whole
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """As far as the stream knows its length.

        Raises:
            TypeError: if it does not.
        """
        groups, rest = divmod(len(self.dataset), self.world * self.block)
        count = groups * self.block + min(self.block, rest)
        return count // self.whole * self.whole if self.whole else count

    def __iter__(self) -> Iterator[Any]:
        samples = self._samples()
        if not self.whole:
            yield from samples
        while self.whole and len(batch := tuple(itertools.islice(samples, self.whole))) == self.whole:
            yield from batch

    def _samples(self) -> Iterator[Any]:
        if self.world == 1:
            return iter(self.dataset)
        if hasattr(self.dataset, "lazily"):
            return self._own(self.dataset.lazily())
        generator = getattr(self.dataset, "generator", None)
        if isinstance(generator, torch.Generator) and not hasattr(self.dataset, "set_epoch"):
            generator.manual_seed(self.epoch)  # as accelerate does: the same order in all processes
        return self._own(partial(_same, sample) for sample in self.dataset)

    def _own(self, samples: Iterator[Callable[[], Any]]) -> Iterator[Any]:
        """This process's part of each group of `world * block` samples, as many as the first process has of it."""
        last: Any = None
        owed = 0
        while group := tuple(itertools.islice(samples, self.world * self.block)):
            own = group[self.rank * self.block : (self.rank + 1) * self.block]
            for number in range(min(self.block, len(group))):
                made = own[number]() if number < len(own) else group[0]() if last is None else None
                if made is None and last is None:  # it cannot be used, and there is nothing to repeat yet
                    owed += 1
                    continue
                last = last if made is None else made
                yield from [Repeated(last)] * owed
                owed = 0
                yield made if number < len(own) and made is not None else Repeated(last)
        if owed:
            raise InputError(f"data: the stream had no usable image for process {self.rank}, {owed} were skipped")


def _same(sample: Any) -> Any:
    return sample


class InOrder(IterableDataset):
    """A map-style data set as a stream; loading workers take turns at `group` samples."""

    def __init__(self, dataset: Any, group: int) -> None:
        self.dataset, self.group = dataset, group

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        return (sample() for sample in self.lazily())

    def lazily(self) -> Iterator[Callable[[], Any]]:
        """For each sample a function that reads it."""
        worker = get_worker_info()
        for index in range(len(self.dataset)):
            if worker is None or index // self.group % worker.num_workers == worker.id:
                yield partial(self.dataset.__getitem__, index)
