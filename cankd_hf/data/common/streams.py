"""Streamed data: an iterable data set with a shuffle buffer."""

import itertools
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.utils.data import IterableDataset

from cankd_hf.data.common.dataset import Source, StreamSource, Transform
from cankd_hf.data.common.decode import Sample, Unlabelled, Unusable, is_left_out
from cankd_hf.errors import InputError

logger = logging.getLogger(__name__)


def stream_of(source: Source, shards: int = 8) -> StreamSource:
    """Stream a source by its indices: they go through the shuffle buffer and are decoded after it."""
    from datasets import Dataset

    numbers = Dataset.from_dict({"index": list(range(len(source)))})
    rows = numbers.to_iterable_dataset(num_shards=min(shards, len(source)))
    return StreamSource(rows, partial(_load, source))


def _load(source: Source, row: dict[str, Any], number: int) -> Sample:
    """The sample of a row of indices; a function of its own, so that it pickles."""
    return source.load(row["index"])


class StreamDataset(IterableDataset):
    """Transformed samples of a stream, at most `limit`, without a length: training needs `training.max_steps`.

    Shards of rows are distributed among loading processes by `datasets`. `shuffle_buffer` is in rows (0: in order).
    For a row that cannot be used, `on_error="stop"` raises; `"skip"` skips it with a warning.
    """

    def __init__(
        self,
        source: StreamSource,
        transform: Transform,
        shuffle_buffer: int = 0,
        limit: int | None = None,
        on_error: str = "stop",
        seed: int = 0,
    ) -> None:
        self.source = source
        self.transform = transform
        self.on_error = on_error
        self.shuffle_buffer = shuffle_buffer
        self._in_order = source.rows if limit is None else source.rows.take(limit)
        self.set_seed(seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in self._samples():
            yield self.transform(sample.image, sample.label)

    def set_seed(self, seed: int) -> None:
        """Shuffles by another seed; the trainer sets its `data_seed`, else its `seed`."""
        rows, buffer = self._in_order, self.shuffle_buffer
        self.rows = rows.shuffle(seed=seed, buffer_size=buffer) if buffer else rows

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle for each epoch; the Trainer calls it."""
        self.rows.set_epoch(epoch)

    def preview(self, count: int) -> list[Sample]:
        """The first samples before any transform, for pictures and checks."""
        return list(itertools.islice(self._samples(), count))

    def lazily(self) -> Iterator[Callable[[], dict[str, Any] | None]]:
        """For each row a function that decodes and transforms it; None for a row that is left out."""
        tally = _Tally(self.on_error)
        for number, row in enumerate(self.rows):
            yield partial(self._made, number, row, tally)
        tally.tell()

    def _made(self, number: int, row: dict[str, Any], tally: "_Tally") -> dict[str, Any] | None:
        sample = tally.sample(self.source, row, number)
        return None if sample is None else self.transform(sample.image, sample.label)

    def _samples(self) -> Iterator[Sample]:
        tally = _Tally(self.on_error)
        for number, row in enumerate(self.rows):
            sample = tally.sample(self.source, row, number)
            if sample is not None:
                yield sample
        if tally.skipped and not tally.good:
            raise InputError(f"data: the stream ended without one usable image, {tally.skipped} were skipped")
        tally.tell()


class _Tally:
    """What is left out in one pass over a stream."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.good = self.skipped = self.bare = self.dropped = 0

    def sample(self, source: StreamSource, row: dict[str, Any], number: int) -> Sample | None:
        """A row's sample; None for one that is left out, with a warning for the first of its kind."""
        try:
            sample = source.decode(row, number)
        except Unusable as problem:
            if not is_left_out(problem, self.on_error):
                raise
            self.skipped += 1
            self.bare += isinstance(problem, Unlabelled)
            if self.bare <= 1 or not isinstance(problem, Unlabelled):
                logger.warning("skipped: %s", problem)
            return None
        self.good += 1
        if sample.dropped and not self.dropped:
            logger.warning("data: left out of its label, the first of the stream: %s", sample.dropped[0])
        self.dropped += len(sample.dropped)
        return sample

    def tell(self) -> None:
        """Warns of the counts."""
        for count, what in ((self.bare, "images without a mask"), (self.dropped, "parts of labels")):
            if count:
                logger.warning("data: %d %s are left out in this pass over the stream", count, what)
