"""Augmentation that depends on (seed, epoch, sample) and on nothing else."""

import itertools
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from cankd_hf.data.common.batch import META
from cankd_hf.data.common.seeds import derived_seed, seeded


def _shared_epoch() -> torch.Tensor:
    """The number of an epoch; shared, so that workers that live through several epochs see the new number."""
    return torch.zeros((), dtype=torch.int64).share_memory_()


def _with_meta(sample: Any, index: int, view: int) -> Any:
    """The sample with its number and view; what the data set itself calls `meta` goes on to its collator."""
    if not isinstance(sample, Mapping):
        return sample
    return {**sample, META: (index, view, *([sample[META]] if META in sample else []))}


class SeededDataset(Dataset):
    """Reads each sample of a map-style data set under its own random state, and adds its number and view as `meta`.

    A run that is resumed, or split over more workers or processes, then sees the same crops and flips: with the usual
    stream of random numbers the workers of a resumed epoch draw other ones, because skipped batches draw none. Covered
    are the generators of torch, numpy and `random`.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch = _shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        view = int(self._epoch)
        # Large odd multipliers keep neighbours apart; the generators scramble the rest.
        with seeded((self.seed * 1_000_003 + view) * 1_000_000_007 + index):
            return _with_meta(self.dataset[index], index, view)


class SeededStream(IterableDataset):
    """Reads an iterable data set with a random state for each sample, by seed, epoch, worker and its number there.

    For streams what `SeededDataset` is for map-style data sets; samples have no index, so `meta` holds -1.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch = _shared_epoch()

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer; the data set learns of it where it is iterated, which may be another process."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        view, worker = int(self._epoch), get_worker_info()
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(view)
        samples = iter(self.dataset)
        for number in itertools.count():
            with seeded(derived_seed(self.seed, view, 0 if worker is None else worker.id, number)):
                sample = next(samples, samples)
            if sample is samples:
                return
            yield _with_meta(sample, -1, view)


class SizedSeededStream(SeededStream):
    """A `SeededStream` of a data set that knows its length."""

    def __len__(self) -> int:
        return len(self.dataset)


def seeded_views(dataset: Any, seed: int, data_seed: int | None) -> Any:
    """A training set whose augmentation depends on `seed`; a stream of ours is shuffled by `data_seed`, else by it."""
    if hasattr(dataset, "set_seed"):
        dataset.set_seed(seed if data_seed is None else data_seed)
    if isinstance(dataset, IterableDataset):
        return (SizedSeededStream if isinstance(dataset, Sized) else SeededStream)(dataset, seed)
    return SeededDataset(dataset, seed) if isinstance(dataset, Sized) else dataset
