"""Streamed data: an iterable data set with a shuffle buffer."""

import itertools
import logging
from collections.abc import Iterator
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
    return StreamSource(rows, lambda row, _: source.load(row["index"]))


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
        rows = source.rows if limit is None else source.rows.take(limit)
        self.rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer) if shuffle_buffer else rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for sample in self._samples():
            yield self.transform(sample.image, sample.label)

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle for each epoch; the Trainer calls it."""
        self.rows.set_epoch(epoch)

    def preview(self, count: int) -> list[Sample]:
        """The first samples before any transform, for pictures and checks."""
        return list(itertools.islice(self._samples(), count))

    def _samples(self) -> Iterator[Sample]:
        good = skipped = bare = 0
        dropped: list[str] = []
        for number, row in enumerate(self.rows):
            try:
                sample = self.source.decode(row, number)
            except Unusable as problem:
                if not is_left_out(problem, self.on_error):
                    raise
                skipped += 1
                bare += isinstance(problem, Unlabelled)
                if bare <= 1 or not isinstance(problem, Unlabelled):
                    logger.warning("skipped: %s", problem)
                continue
            good += 1
            if sample.dropped and not dropped:
                logger.warning("data: left out of its label, the first of the stream: %s", sample.dropped[0])
            dropped += sample.dropped
            yield sample
        if skipped and not good:
            raise InputError(f"data: the stream ended without one usable image, {skipped} were skipped")
        for count, what in ((bare, "images without a mask"), (len(dropped), "parts of labels")):
            if count:
                logger.warning("data: %d %s are left out in this pass over the stream", count, what)
