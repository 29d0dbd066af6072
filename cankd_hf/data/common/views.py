"""Augmentation that depends on (seed, epoch, sample) and on nothing else."""

import operator
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from cankd_hf.data.common.batch import META


class SeededDataset(Dataset):
    """Reads each sample of a map-style data set under its own random state, and adds its number and view as `meta`.

    A run that is resumed, or split over more workers or processes, then sees the same crops and flips: with the usual
    stream of random numbers the workers of a resumed epoch draw other ones, because skipped batches draw none.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # Shared, so that workers that live through several epochs see the new number.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        view, number = int(self._epoch), _number(index)
        with torch.random.fork_rng(devices=[]):
            # Large odd multipliers keep neighbours apart; manual_seed scrambles the rest.
            torch.manual_seed((self.seed * 1_000_003 + view) * 1_000_000_007 + number & 0x7FFF_FFFF_FFFF_FFFF)
            sample = self.dataset[index]
        if isinstance(sample, Mapping):  # what the data set itself calls so goes on to its collator
            sample = {**sample, META: (number, view, *([sample[META]] if META in sample else []))}
        return sample


def _number(index: Any) -> int:
    """The number of a sample; samplers may yield NumPy integers, or keys of any kind."""
    try:
        return operator.index(index)
    except TypeError:
        return zlib.crc32(repr(index).encode())
