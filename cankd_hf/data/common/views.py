"""Augmentation that depends on (seed, epoch, sample) and on nothing else."""

import copy
import itertools
import operator
import zlib
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from cankd_hf.data.common.batch import META
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.seeds import derived_seed, seeded, students_seed
from cankd_hf.data.common.streams import StreamDataset
from cankd_hf.data.common.transforms import ImageTransform, Normalize, Unnormalized
from cankd_hf.data.common.unlabelled import Visit, WithUnlabelled
from cankd_hf.data.common.unlabelled_stream import StreamWithUnlabelled


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

    @property
    def epoch(self) -> int:
        """The present epoch."""
        return int(self._epoch)

    def __getattr__(self, name: str) -> Any:
        """What else the data set has, such as `column_names`; nothing by which a loader would read it directly."""
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        index, epoch = index if isinstance(index, Visit) else (index, self.epoch)
        number = _number(index)
        view = epoch  # of geometry and weak augmentation
        # Large odd multipliers keep neighbours apart; the generators scramble the rest.
        with (
            students_seed(derived_seed(self.seed, "student", epoch, number)),
            seeded((self.seed * 1_000_003 + view) * 1_000_000_007 + number, self.torch_only()),
        ):
            return _with_meta(self.dataset[index], number, view)

    def torch_only(self) -> bool:
        """Whether samples take no random numbers but torch's: what this package reads, transformed by its transforms.
        It is asked for each sample, as the transform may be replaced."""
        own = self.dataset
        parts = (own.labelled, own.unlabelled) if type(own) is WithUnlabelled else (own,)
        return all(
            type(part) is ImageDataset
            and all(type(inner).__module__.startswith("cankd_hf.") for inner in (part.source, part.transform))
            for part in parts
        )


def _number(index: Any) -> int:
    """The number of a sample; samplers may yield NumPy integers, or keys of any kind."""
    try:
        return operator.index(index)
    except TypeError:
        return zlib.crc32(repr(index).encode())


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
        view = self._begin()
        samples = iter(self.dataset)
        for number in itertools.count():
            with self._state(view, number):
                sample = next(samples, samples)
            if sample is samples:
                return
            yield _with_meta(sample, -1, view)

    def again(self, turn: int) -> "SeededStream":
        """The stream for a further pass within one epoch, in another order and with another augmentation."""
        if not turn:
            return self
        made = copy.copy(self)
        made.seed, made.dataset = derived_seed(self.seed, "turn", turn), copy.copy(self.dataset)
        if hasattr(made.dataset, "set_seed"):
            made.dataset.set_seed(made.seed)
        return made

    def lazily(self) -> Iterator[Callable[[], Any]]:
        """For each sample a function that makes it, with the random state that `__iter__` would give it."""
        if not hasattr(self.dataset, "lazily"):
            yield from ((lambda sample=sample: sample) for sample in self)
            return
        view = self._begin()
        for number, make in enumerate(self.dataset.lazily()):
            yield partial(self._made, make, view, number)

    def _made(self, make: Callable[[], Any], view: int, number: int) -> Any:
        with self._state(view, number):
            sample = make()
        return None if sample is None else _with_meta(sample, -1, view)

    def _begin(self) -> int:
        """Tells the data set its epoch, and returns it."""
        view = int(self._epoch)
        generator = getattr(self.dataset, "generator", None)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(view)
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(view)  # as accelerate does: the same order in all processes
        return view

    @contextmanager
    def _state(self, view: int, number: int) -> Iterator[None]:
        worker = get_worker_info()
        place = view, 0 if worker is None else worker.id, number
        with students_seed(derived_seed(self.seed, "student", *place)), seeded(derived_seed(self.seed, *place)):
            yield


class SizedSeededStream(SeededStream):
    """A `SeededStream` of a data set that knows its length."""

    def __len__(self) -> int:
        return len(self.dataset)


def is_stream(dataset: Any) -> bool:
    """Whether samples can only be read in order; some such data sets have a length, or a `__getitem__` that raises."""
    return isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized)


def seeded_views(dataset: Any, seed: int, data_seed: int | None) -> Any:
    """A training set whose augmentation, and the order of a stream of ours, depend on `data_seed`, else on `seed`."""
    if dataset is None:
        return None
    seed = seed if data_seed is None else data_seed
    if isinstance(dataset, StreamWithUnlabelled):
        seeds = seed, derived_seed(seed, "unlabelled") % 2**32
        labelled, unlabelled = (
            seeded_views(half, own, None)
            for half, own in zip((dataset.labelled, dataset.unlabelled), seeds, strict=True)
        )
        return StreamWithUnlabelled(labelled, unlabelled, dataset.ratio)
    if hasattr(dataset, "set_seed"):
        dataset.set_seed(seed)
    if is_stream(dataset):
        return (SizedSeededStream if isinstance(dataset, Sized) else SeededStream)(dataset, seed)
    return SeededDataset(dataset, seed)


def unnormalized(dataset: Any) -> Any:
    """The data set as loaders read it: items of ours hold bytes, which their batch normalises on the device.

    Any other data set, and any other transform, is returned as it is; `dataset` itself is not changed.
    """
    transform = dataset.transform if type(dataset) in (ImageDataset, StreamDataset) else None
    if (
        isinstance(transform, ImageTransform)
        and type(transform).__call__ is ImageTransform.__call__
        and type(transform.normalize) is Normalize  # which leaves a loading process with its bytes
    ):
        made = copy.copy(dataset)
        made.transform = Unnormalized(transform)
        return made
    if type(dataset) in (WithUnlabelled, StreamWithUnlabelled):
        return type(dataset)(unnormalized(dataset.labelled), unnormalized(dataset.unlabelled), dataset.ratio)
    if type(dataset) in (SeededDataset, SeededStream, SizedSeededStream):
        made = copy.copy(dataset)
        made.dataset = unnormalized(dataset.dataset)
        return made
    return dataset
