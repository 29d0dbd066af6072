"""Labelled and unlabelled images in one training set, in a fixed ratio within every batch."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from cankd_hf.config.data import labelled_in
from cankd_hf.data.common.seeds import derived_seed
from cankd_hf.errors import InputError


class Visit(NamedTuple):
    """One look at a sample: its number, and how often all samples of its half have been seen before."""

    sample: int
    view: int


class WithUnlabelled(Dataset[Any]):
    """Labelled images, then unlabelled ones, for a `CanKDTrainer` with a teacher.

    Every batch of each process has one unlabelled image for each labelled one, or `ratio` of them: its first rows are
    labelled. The labelled ones have the task's loss, all of them the teacher's. An epoch has as many batches as it
    would have without the unlabelled images. A trainer without a teacher uses the labelled images alone.

    Args:
        labelled: a map-style data set with `labels`.
        unlabelled: one whose samples have none.
        ratio: unlabelled images for each labelled one; None: no batch is shared out, all images are drawn alike.
    """

    def __init__(self, labelled: Any, unlabelled: Any, ratio: float | None = 1.0) -> None:
        if not len(labelled) or not len(unlabelled):
            raise InputError(
                f"data.unlabelled: expected images of both kinds, got {len(labelled)} labelled and {len(unlabelled)} "
                "unlabelled; leave the setting out"
            )
        self.labelled, self.unlabelled, self.ratio = labelled, unlabelled, ratio

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, index: int) -> Any:
        half, number = self.half(index)
        return half[number]

    def name(self, index: int) -> str:
        """File name or place of a sample, for messages."""
        half, number = self.half(index)
        return str(half.name(number))

    def half(self, index: int) -> tuple[Any, int]:
        """The data set that a sample is of, and its number there."""
        first = len(self.labelled)
        return (self.labelled, index) if index < first else (self.unlabelled, index - first)


class MixedSampler(Sampler[Visit]):
    """Samples of a `WithUnlabelled` so that consecutive batches have the labelled images first, in its ratio.

    Each half goes through its images in passes, shuffled anew each time, on from epoch to epoch: where a pass begins
    depends on the number of batches so far, not on borders of epochs. What an epoch holds depends on the seed and its
    number alone, so that a resumed run sees the same; several processes together see the images of one with a batch
    as large as all of theirs.

    Args:
        dataset: a `SeededDataset` of a `WithUnlabelled`.
        batch: images in a batch of one process.
        world: number of processes.
        whole: leave out the last batches of an epoch that not all of the labelled images would fill.
        shuffle: False: the images in their order.
    """

    def __init__(self, dataset: Any, batch: int, world: int = 1, whole: bool = False, shuffle: bool = True) -> None:
        mixed: WithUnlabelled = dataset.dataset
        self.dataset, self.shuffle = dataset, shuffle
        self.sizes = len(mixed.labelled), len(mixed.unlabelled)
        own = labelled_in(batch, 1.0 if mixed.ratio is None else mixed.ratio)
        self.parts = own, batch - own
        images = self.sizes[0]
        together = batch * world
        self.batches = world * (images // together if whole else -(-images // together))

    def __len__(self) -> int:
        return self.batches * sum(self.parts)

    def __iter__(self) -> Iterator[Visit]:
        epoch = self.dataset.epoch
        orders = [lru_cache(maxsize=2)(self._order(half)) for half in (0, 1)]
        for number in range(epoch * self.batches, (epoch + 1) * self.batches):
            for half, (size, count) in enumerate(zip(self.sizes, self.parts, strict=True)):
                for place in range(number * count, (number + 1) * count):
                    turn, index = divmod(place, size)
                    yield Visit(orders[half](turn)[index] + half * self.sizes[0], turn)

    def _order(self, half: int) -> Any:
        """The function that gives the order of the images of a half in one of its passes."""

        def order(turn: int) -> list[int]:
            if not self.shuffle:
                return list(range(self.sizes[half]))
            generator = torch.Generator().manual_seed(derived_seed(self.dataset.seed, "order", half, turn))
            found: list[int] = torch.randperm(self.sizes[half], generator=generator).tolist()
            return found

        return order
