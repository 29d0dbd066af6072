"""The map-style data set for the trainer: a source of samples, a transform, and a rule for bad images."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from cankd_hf.data.common.batch import CONTENT, content_hash
from cankd_hf.data.common.cache import SampleCache
from cankd_hf.data.common.decode import Sample, Unusable, is_left_out

logger = logging.getLogger(__name__)
Transform = Callable[[torch.Tensor, Any], dict[str, Any]]


class Source(Protocol):
    """A sequence of samples: a folder, a table, a generator. Samples of a `generated` source are not checked."""

    generated: bool

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """File name or place of a sample, without decoding it."""

    def load(self, index: int) -> Sample:
        """Decode one sample; raises `Unusable` naming the file."""


@dataclass(frozen=True)
class Known:
    """What a source knows of its images without decoding them."""

    labels: frozenset[int]  # the classes that occur
    suspects: list[int]  # indices of images whose label does not fit their stated size
    sizes: list[tuple[tuple[int, int], int]]  # (height, width) as stated, and index, where it is


@dataclass(eq=False)
class StreamSource:
    """Samples of a stream."""

    rows: Any  # a `datasets.IterableDataset` of undecoded rows
    decode: Callable[[dict[str, Any], int], Sample]  # (row, running number) -> sample


AnySource = Source | StreamSource
Sources = Mapping[str, tuple[AnySource, Sequence[int]]]  # role -> source and the indices to use (none of a stream)


class ImageDataset(Dataset):
    """Samples of a source, or those at `indices`, with `transform` applied to (image [3, H, W] uint8, `Sample.label`).

    `cache` keeps decoded samples for all loading processes, see `SampleCache`. For an image that does not decode,
    `on_error="stop"` raises; `"skip"` replaces it by the next one that does (ignored in scores, so that no image is
    scored twice).
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        indices: Sequence[int] | None = None,
        cache: bool = False,
        on_error: str = "stop",
    ) -> None:
        self.source = source
        self.transform = transform
        self.indices = list(range(len(source))) if indices is None else list(indices)
        self.on_error = on_error
        self.extremes: list[int] = []  # the images that a model is the least likely to take, by their index here
        self._cache = SampleCache() if cache else None
        self._contents: dict[int, bytes] | None = None  # hashes of the images by their number in the source

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.usable(index)
        item = self.transform(sample.image, sample.label)
        if self._contents is not None:
            number = self.indices[index]
            if number not in self._contents:
                self._contents[number] = content_hash(sample.image)
            item[CONTENT] = self._contents[number]
        return item

    def identifying(self) -> "ImageDataset":
        """The same data set, whose items have the place of their whole image, and its hash, which is computed once in
        each process. Its transform has to be one that `places`."""
        made = copy.copy(self)
        made.transform, made._contents = copy.copy(self.transform), {}
        made.transform.tells_place = True  # type: ignore[attr-defined]
        return made

    @property
    def is_read_each_time(self) -> bool:
        """Whether a cache of decoded samples would save work."""
        return self._cache is None

    def name(self, index: int) -> str:
        """File name or place of a sample, for messages."""
        return self.source.name(self.indices[index])

    def part(self, indices: Sequence[int]) -> "ImageDataset":
        """The same data set with these samples alone, by their indices here."""
        made, places = copy.copy(self), {index: place for place, index in enumerate(indices)}
        made.indices = [self.indices[index] for index in indices]
        made.extremes = [places[index] for index in self.extremes if index in places]
        return made

    def usable(self, index: int) -> Sample:
        """The decoded sample, or the one that stands in for it, before any transform."""
        try:
            return self.raw(index)
        except Unusable as problem:
            if not is_left_out(problem, self.on_error):
                raise
            return self._stand_in(index, problem)

    def raw(self, index: int) -> Sample:
        """The decoded sample before any transform, for pictures and checks."""
        number = self.indices[index]
        return self.source.load(number) if self._cache is None else self._cache.sample(number, self.source.load)

    def _stand_in(self, index: int, problem: Unusable) -> Sample:
        """The next image that decodes, not to be scored, in place of a broken one."""
        logger.warning("skipped: %s", problem)
        for step in range(1, len(self)):
            try:
                return self.raw((index + step) % len(self)).standing_in()
            except Unusable:
                continue
        raise Unusable(f"no image of the split can be used; the last one: {problem}")
