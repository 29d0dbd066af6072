"""Training with unlabelled images: which of them are used, in which order, and how strongly they are augmented."""

import copy
import logging
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from cankd_hf.config.data import StrongConfig, check_mixed, labelled_in
from cankd_hf.data.common.batch import Batch, BatchCollator
from cankd_hf.data.common.strong import Strong
from cankd_hf.data.common.unlabelled import MixedSampler, WithUnlabelled
from cankd_hf.data.common.unlabelled_stream import StreamWithUnlabelled
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.errors import InputError
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.class_shares import ClassShares

logger = logging.getLogger(__name__)
# Narrow nets gain little from strong augmentation, or lose by it (ImageNet+ of 2303.08983: MobileNetV2-0.25, 1.5M
# parameters, -0.5; V3-S, 2.5M, +1.1).
SMALL, SPARED = 2_000_000, 0.5


def is_shared_out(dataset: Any) -> bool:
    """Whether each batch of a training set has a part of labelled and one of unlabelled images."""
    mixed = dataset.dataset if isinstance(dataset, SeededDataset) else dataset
    if isinstance(mixed, StreamWithUnlabelled):
        return True
    return isinstance(mixed, WithUnlabelled) and mixed.ratio is not None


class UnlabelledMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` for images that only a teacher labels."""

    def _prepare_unlabelled(self, collator: BatchCollator, deepest: float) -> None:
        """Sets the strength of the augmentation by the student, and the steps in which its pictures are cut.

        Raises:
            InputError: for batches that cannot be shared out, or are too small to be mixed.
        """
        collator.stride = self.distiller.coarsest_stride or round(deepest)
        dataset: Any = self.train_dataset
        halves = {"labelled": dataset}
        batch = self.args.train_batch_size
        sizes = {"labelled": batch}
        self._has_unlabelled = is_shared_out(dataset) and self._learns_from_teachers()
        self._shares = ClassShares(list(self.task.id2label.values()), self.task.ignore_index)
        if self._has_unlabelled:
            mixed = dataset.dataset if isinstance(dataset, SeededDataset) else dataset
            halves = {"labelled": mixed.labelled, "unlabelled": mixed.unlabelled}
            own = labelled_in(batch, mixed.ratio)
            sizes = {"labelled": own, "unlabelled": batch - own}
            if isinstance(dataset, SeededDataset):
                self._mixed(dataset)
        for name, half in halves.items():
            for strong in _strong(half):
                small = self.student.num_parameters() < SMALL
                if strong.config.strength is None:
                    strong.set_strength(SPARED if small else 1.0)
                if strong.config.cutmix:
                    check_mixed(name, sizes[name])
                self._tell_coarse(strong.config, collator.stride)

    def _tell_coarse(self, config: StrongConfig, stride: int) -> None:
        """Warns of rectangles that are larger than asked for, or never fit, as they are multiples of a stride."""
        height, width = self.distiller.image_size
        least = stride * stride / (height * width)
        for key, asked in {"cutmix": bool(config.cutmix), "erase": any(config.erase or ())}.items():
            most = getattr(config, f"{key}_area")[1]
            if asked and least > most:
                none = stride > min(height, width)
                effect = (
                    "none fits, so nothing is done" if none else f"one takes at least {least:.0%}, not {most:.0%},"
                )
                logger.warning(
                    "data.strong.%s: rectangles are multiples of %d pixels, the coarsest stride that is compared: %s "
                    "in pictures of %d x %d; enlarge these, or compare finer levels (distill.terms.N.pairs)",
                    *(key, stride, effect, height, width),
                )

    def images_told(self) -> str | None:
        """How many images of each kind there are, how a batch is shared out, and how often each is seen."""
        dataset: Any = self.train_dataset
        if not is_shared_out(dataset) or not self._learns_from_teachers():
            return None
        mixed = dataset.dataset if isinstance(dataset, SeededDataset) else dataset
        args, batch = self.args, self.args.train_batch_size
        own = labelled_in(batch, mixed.ratio)
        told = f"batches of {own} labelled and {batch - own} unlabelled images"
        if not isinstance(mixed, WithUnlabelled):
            return f"data.unlabelled: {told}, from a stream"
        counts = len(mixed.labelled), len(mixed.unlabelled)
        batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
        if args.max_steps <= 0:
            batches = round(args.num_train_epochs * self._mixed(dataset).batches)
        passes = [batches * part / count for part, count in zip((own, batch - own), counts, strict=True)]
        return (
            f"data.unlabelled: {counts[0]} labelled and {counts[1]} unlabelled images in {told}; during training each "
            f"is seen {passes[0]:.3g} and {passes[1]:.3g} times"
        )

    def _ask_teachers(self, batch: Batch, factors: list[float], measure: bool) -> dict[str, Any]:
        given = super()._ask_teachers(batch, factors, measure)
        labels, training = batch.get("labels"), cast(nn.Module, self.model).training
        if measure and training and isinstance(labels, Tensor) and labels.ndim == 3 and self._has_unlabelled:
            self._shares.see(given.get("teachers") or {}, labels, batch.meta)
        return given

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and (found := self._shares.shares()):
            logs["unlabelled_rarest"] = round(min(found.values()), 4)
            said = self._shares.vanished()
            if said and self.args.process_index == 0:
                logger.warning("%s", said)
        super().log(logs, start_time)

    def _learns_from_teachers(self) -> bool:
        return any(term.counts for term in self.distiller.objective.terms)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        if kwargs.get("is_training", False):
            dataset = self._taught(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, SeededDataset) and is_shared_out(dataset):
            return self._mixed(dataset)
        return super()._get_train_sampler(train_dataset)

    def _mixed(self, dataset: Any) -> MixedSampler:
        """The order of labelled and unlabelled images.

        Raises:
            InputError: where the settings ask for an order of their own, or for batches that cannot be shared out.
        """
        args, strategy = self.args, self.args.train_sampling_strategy
        if strategy not in ("random", "sequential"):
            raise InputError(
                f"training.train_sampling_strategy: expected random or sequential with data.unlabelled, got {strategy}"
            )
        batch: int = self._train_batch_size or args.train_batch_size
        return MixedSampler(dataset, batch, args.world_size, args.dataloader_drop_last, strategy == "random")

    def _taught(self, dataset: Any) -> Any:
        """The images that are trained on: without a teacher to answer for the unlabelled ones the others alone, so
        that not even a BatchNorm sees a difference."""
        if not is_shared_out(dataset) or self._learns_from_teachers():
            return dataset
        logger.warning("data.unlabelled: not used, as nothing is learned from a teacher")
        if isinstance(dataset, StreamWithUnlabelled):
            return dataset.labelled
        alone = copy.copy(dataset)
        alone.dataset = dataset.dataset.labelled
        return alone


def _strong(half: Any) -> Iterator[Strong]:
    """The strong augmentation of a data set of ours, if it has one."""
    while half is not None:
        strong = getattr(getattr(half, "transform", None), "strong", None)
        if isinstance(strong, Strong):
            yield strong
            return
        if isinstance(half, WithUnlabelled):
            for part in (half.labelled, half.unlabelled):
                yield from _strong(part)
            return
        half = getattr(half, "dataset", None)
