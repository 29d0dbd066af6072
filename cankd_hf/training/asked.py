"""What stored teachers are asked about: the views of a training, or its whole images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from cankd_hf.config.teacher import CacheConfig
from cankd_hf.data.common.batch import PICTURES, PLACE, Batch
from cankd_hf.data.common.unlabelled import MixedSampler
from cankd_hf.data.common.views import seeded_views
from cankd_hf.errors import InputError
from cankd_hf.teachers.pictures import Grid, Pictures, Views, WholeImages
from cankd_hf.teachers.stored import StoredTeacher, StoredTeachers
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.placing import reads
from cankd_hf.training.pseudo import with_boxes
from cankd_hf.training.unlabelled import is_shared_out
from cankd_hf.training.whole_images import (
    all_of,
    check_needs,
    coarsest,
    grids_of,
    identifying,
    orientations,
    whole_image,
    whole_share,
)


class AskedMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` about the pictures whose answers are stored."""

    @property
    def caches(self) -> dict[str, CacheConfig]:
        """The settings of the stored teachers by name."""
        return {name: one.config.cache for name, one in self.teachers.items() if one.config.cache is not None}

    def seeded_views(self, dataset: Any) -> Any:
        """A training set whose pictures depend on seeds alone, and repeat for stored teachers.

        Raises:
            InputError: if these differ in their views.
        """
        found = {(cache.views, cache.seed, cache.whole) for cache in self.caches.values()}
        if len(found) > 1:
            raise InputError(
                f"teachers: expected one number of views, one seed and one `whole` in all caches, got "
                f"{sorted(found, key=str)}; write the same"
            )
        views, seed, whole = next(iter(found), (None, None, False))
        if whole and dataset is not None:
            dataset = identifying(dataset)
        return seeded_views(dataset, self.args.seed, self.args.data_seed, views, seed)

    @property
    def stores_whole_images(self) -> bool:
        """Whether stored answers are for whole images."""
        return any(cache.whole for cache in self.caches.values())

    @property
    def whole_share(self) -> float | None:
        """Pixels of a whole image in those of a training picture; None where it cannot be said where in an image a
        picture is."""
        dataset: Any = self.train_dataset
        return whole_share(getattr(dataset, "dataset", dataset), self.distiller.image_size)

    @property
    def can_store_whole_images(self) -> bool:
        """Whether `teacher.cache.whole` would do."""
        try:
            for name in self.teachers:
                check_needs("teacher.cache", self._needs(name), self.distiller.teachers[name])
        except InputError:
            return False
        return self.whole_share is not None

    def multiple(self, name: str) -> int:
        """What sides of whole images are rounded up to a multiple of for a teacher."""
        return coarsest(self.distiller.teachers[name].levels, self.teachers[name].rule)

    def _pictures(self, name: str, batch: Batch) -> Pictures:
        """What a stored teacher is asked about for a batch."""
        if PLACE not in batch.meta:
            return Views(batch)
        canvas = batch.teacher_images.shape[-2], batch.teacher_images.shape[-1]
        teacher, shape = self.teachers[name], self.distiller.teachers[name]
        rule = teacher.rule
        resized = teacher.config.scale != 1 or rule.multiple > 1 or rule.fixed is not None or rule.square
        grids = grids_of(shape, self.distiller.image_size, canvas, resized)
        meta = batch.meta
        return self._whole(name, batch[PICTURES], meta["sample"], meta[PLACE], grids)

    def _whole(
        self, name: str, keys: Sequence[bytes], numbers: Tensor, place: Tensor, grids: Mapping[str, Grid] | None = None
    ) -> WholeImages:
        """Whole images of the training set about which a teacher is asked."""
        dataset: Any = self.train_dataset
        multiple = self.multiple(name)
        load = lambda number: whole_image(dataset.dataset, number, multiple)  # noqa: E731
        return WholeImages(keys, numbers, place, self.args.device, load, grids or {})

    def fill(self) -> Iterator[int]:
        """Asks the stored teachers about all that they will be asked about in a training, and yields the number of
        pictures of each batch."""
        dataset: Any = self.train_dataset
        source = self.source
        assert isinstance(source, StoredTeachers)
        if self.stores_whole_images:
            process = self.args.process_index, self.args.world_size
            for keys, numbers, place in all_of(dataset.dataset, *process):
                for name, one in self.stored.items():
                    one.fill(self._whole(name, keys, numbers, place))
                yield len(keys)
            source.flush()
            return
        loader: Any = self.get_train_dataloader()
        for epoch in range(int(self.epochs_of_views)):
            dataset.set_epoch(epoch)
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            for batch in self.batches_of(loader):
                source(batch, list(self.stored))
                yield len(batch["pixel_values"])
            source.flush()

    @property
    def stored(self) -> dict[str, StoredTeacher]:
        """The teachers whose stores are open."""
        return self.source.stored if isinstance(self.source, StoredTeachers) else {}

    def _answers(self) -> int:
        """The answers that the training asks for."""
        args, images = self.args, len(self.train_dataset) if self.train_dataset is not None else 0  # type: ignore[arg-type]
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = self.state.max_steps or args.max_steps
        most = images * self.answers_each
        return min(most, steps * batch) if steps > 0 else most

    @property
    def answers_each(self) -> int:
        """Answers that are stored of each image."""
        if self.stores_whole_images:
            dataset: Any = self.train_dataset
            return orientations(dataset.dataset)
        return next((cache.views or 0 for cache in self.caches.values()), 0)

    @property
    def epochs_of_views(self) -> float:
        """After so many epochs all views were seen: as many as there are, or more where one half of a set of labelled
        and unlabelled images is longer than the other; for whole images it cannot be said, as they are mirrored at
        random."""
        if self.stores_whole_images:
            return math.inf
        views = self.answers_each
        dataset: Any = self.train_dataset
        if not is_shared_out(dataset):
            return views
        order = MixedSampler(dataset, self.args.per_device_train_batch_size, self.args.world_size)
        passes = (order.batches * part / size for size, part in zip(order.sizes, order.parts, strict=True))
        return max(math.ceil(views / passed) for passed in passes)

    def _path(self, name: str) -> str:
        return "teacher.cache" if len(self.teachers) == 1 else f"teachers.{name}.cache"

    def _needs(self, name: str) -> set[str]:
        """What the terms read of a teacher: `maps.0`, `logits`, `dense`, `queries`."""
        items = [item for item in self.distiller.placed if item.teacher == name]
        found = {reads(one.term) if one.pair is None else f"maps.{one.pair.teacher}" for one in items}
        return with_boxes(found, self.teachers[name].model) - {"boxes"}
