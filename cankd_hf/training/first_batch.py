"""A look at the first samples of a data set before anything is trained, with the checks that folders get."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from cankd_hf.errors import InputError
from cankd_hf.features.strides import deepest_stride
from cankd_hf.tasks import Task
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.base import TeachingTrainer

TRAINED, EVALUATED = "train_dataset", "eval_dataset"
LOOKED_AT = 8  # samples of a data set that can be indexed; of a stream it is one
# Normalised pixels beyond so many times the range of the statistics are no normalised pixels (0..255 are 58 times).
FAR = 20
OTHER_NAMES = {
    "pixel_values": {"image", "images", "img", "pixels", "pixel_value", "inputs", "input"},
    "labels": {"label", "mask", "masks", "target", "targets", "annotation", "annotations", "segmentation", "objects"},
}


@dataclass
class FirstLook:
    """What the samples of a run must be.

    Args:
        task: says which labels it takes.
        model: the student, whose deepest stride is the least size of an image.
        mean: of the student's input normalisation, for pixels in 0..1.
        std: the same for the standard deviation.
        collate: the user's own collator; None for the task's.
    """

    task: Task
    model: InitVar[PreTrainedModel]
    mean: Sequence[float]
    std: Sequence[float]
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None

    def __post_init__(self, model: PreTrainedModel) -> None:
        self.stride = deepest_stride(model) or 1.0
        self.scored_by_task = True

    def at(self, given: dict[str, Any], args: CanKDConfig, task_weight: float) -> tuple[int, int]:
        """Checks the first samples of the data sets among the arguments of a trainer.

        A stream that can be read only once is replaced in `given` by one with the sample put back that was looked at.

        Args:
            given: arguments of `transformers.Trainer`.
            args: the training arguments.
            task_weight: that of the student's own loss; with 0 no labels are needed in training.

        Returns:
            (height, width) of the first image, 224 x 224 without one, to measure strides and channels with.

        Raises:
            InputError: naming data set and sample, for all data sets with a problem.
        """
        evaluated = given.get("eval_dataset")
        several = evaluated if isinstance(evaluated, dict) else None
        named = {EVALUATED: evaluated}
        if several is not None:
            named = {f"eval_dataset[{key!r}]": one for key, one in several.items()}
        self.scored_by_task = given.get("compute_metrics") is None
        problems: list[str] = []
        size, kept = (224, 224), {}
        for place, dataset in {TRAINED: given.get(TRAINED), **named}.items():
            samples, kept[place] = peek(dataset, args.seed)
            scored = place != TRAINED
            needed = self.scored_by_task if scored else task_weight > 0
            labelled = needed and "labels" in (args.label_names or ["labels"])
            if samples is not None and (said := self.problem(place, samples, labelled, scored)):
                problems.append(said)
            elif size == (224, 224) and samples and _has_pixels(samples[0]):
                size = (int(samples[0]["pixel_values"].shape[-2]), int(samples[0]["pixel_values"].shape[-1]))
        if problems:
            raise InputError(problems)
        if given.get(TRAINED) is not None:
            given[TRAINED] = kept[TRAINED]
        if evaluated is not None:
            sets = [kept[place] for place in named]
            given[EVALUATED] = sets[0] if several is None else dict(zip(several, sets, strict=True))
        return size

    def problem(self, place: str, samples: Sequence[Any], labelled: bool, scored: bool) -> str | None:
        """The first thing that is wrong with samples of a data set, if any.

        Args:
            place: the data set's name in messages.
            samples: the first ones.
            labelled: whether they need labels.
            scored: whether they are for evaluation.
        """
        if not samples:
            return f"{place}: expected at least one sample, got none"
        own = (f"{place}[{n}]: {said}" for n, one in enumerate(samples) if (said := self._of(one, labelled, scored)))
        if self.collate is None and (said := next(own, None)):
            return said
        collate = self.collate or self.task.collate
        copies = [dict(sample) if isinstance(sample, Mapping) else sample for sample in samples]
        try:
            batch = collate(copies)
        except Exception as error:  # whatever a user's collator raises for samples that do not fit
            if said := next(own, None):  # rather than what its collator makes of it
                return said
            sizes = {tuple(s["pixel_values"].shape) for s in samples if _has_pixels(s)}
            shapes = f" (images of {', '.join(map(str, sorted(sizes)))})" if len(sizes) > 1 else ""
            said = " ".join(str(error).split())[:200]
            return (
                f"{place}: expected samples that the data collator puts into one batch, got {type(error).__name__} "
                f"for the first {len(samples)}{shapes}: {said}; resize or pad them alike"
            )
        if self.collate is not None and not isinstance(batch, Mapping):
            return f"data_collator: expected a dict with pixel_values and labels, got {type(batch).__name__}"
        for index, sample in enumerate(_parts(batch) if self.collate is not None else ()):
            if said := self._of(sample, labelled, scored):
                return f"{place}, sample {index} of the first batch: {said}"
        return None

    def too_small(self, pixel_values: Tensor) -> str | None:
        """The problem with images [..., H, W] of fewer pixels than the student's deepest stride, if they are."""
        height, width = pixel_values.shape[-2:]
        if min(height, width) >= self.stride - 1e-3:
            return None
        return (
            f"pixel_values: expected images of at least {self.stride:g} x {self.stride:g} pixels, the deepest stride "
            f"of the student, got {height} x {width}; enlarge them (data.image_size, data.crop_size)"
        )

    def _of(self, sample: Any, labelled: bool, scored: bool) -> str | None:
        """The problem with one sample, if any."""
        if not isinstance(sample, Mapping):
            return f"expected a dict with pixel_values and labels, got {type(sample).__name__}"
        if "pixel_values" not in sample:
            return _missing("pixel_values", sample)
        if said := self._of_pixels(sample["pixel_values"]):
            return said
        if sample.get("labels") is None:
            without = "" if scored else ", or set task_weight=0 to train without"
            return _missing("labels", sample) + without if labelled and self.task.takes_labels else None
        return self.task.label_problem(sample["labels"], tuple(sample["pixel_values"].shape[-2:]), scored)

    def _of_pixels(self, pixels: Any) -> str | None:
        if not isinstance(pixels, Tensor):
            return f"pixel_values: expected a tensor [3, H, W], got {type(pixels).__name__}; convert it"
        shape = list(pixels.shape)
        if pixels.ndim != 3 or shape[0] != 3:
            last = pixels.ndim == 3 and shape[2] == 3
            fix = "move the channels to the front: .permute(2, 0, 1)" if last else "give one RGB image a sample"
            return f"pixel_values: expected [3, H, W], got the shape {shape}; {fix}"
        if not pixels.is_floating_point():
            return (
                f"pixel_values: expected normalised floating point numbers, got {pixels.dtype}; use the student's "
                "image processor, or (pixels / 255 - mean) / std"
            )
        if not pixels.isfinite().all():
            return f"pixel_values: expected finite numbers, got {int((~pixels.isfinite()).sum())} others (NaN or inf)"
        bounds = [abs((value - m) / s) for m, s in zip(self.mean, self.std, strict=True) for value in (0.0, 1.0)]
        most = float(pixels.abs().max())
        if most > FAR * max(bounds):
            return (
                f"pixel_values: expected pixels normalised with the mean {_rounded(self.mean)} and std "
                f"{_rounded(self.std)}, at most about {max(bounds):.1f}, got {most:.4g}; divide 0..255 by 255 first"
            )
        return self.too_small(pixels)


def peek(dataset: Any, seed: int) -> tuple[list[Any] | None, Any]:
    """The first samples of a data set, and the data set to go on with; (None, None) for none.

    No random number is drawn from the global generators.
    """
    if dataset is None:
        return None, None
    with own_random(seed):
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            iterator = iter(dataset)
            once = iterator is iter(dataset)
            samples = list(itertools.islice(iterator, 1))
            return samples, PutBack(samples, dataset) if once else dataset
        indexed: Any = dataset
        return [indexed[index] for index in range(min(LOOKED_AT, len(dataset)))], dataset


@contextmanager
def own_random(seed: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch from a seed; afterwards their generators are as before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class PutBack(IterableDataset[Any]):
    """A stream that can be read only once, after the samples that were already taken from it."""

    def __init__(self, taken: list[Any], rest: Any) -> None:
        self.taken, self.rest = taken, rest

    def __iter__(self) -> Iterator[Any]:
        taken, self.taken = self.taken, []
        yield from taken
        yield from self.rest

    def __getattr__(self, name: str) -> Any:
        if name in ("rest", "taken"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.rest, name)


class FirstBatchMixin(TeachingTrainer):
    """Checks data sets that come later than the constructor, and that no batch is smaller than the student takes."""

    first: FirstLook

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        dataset = self._looked_at(EVALUATED, eval_dataset, self.first.scored_by_task)
        return super().evaluate(dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        dataset = self._looked_at("test_dataset", test_dataset, labelled=False)
        return super().predict(dataset, ignore_keys, metric_key_prefix)

    def _looked_at(self, place: str, dataset: Any, labelled: bool) -> Any:
        """The data set, checked unless the constructor has done so."""
        if dataset is None or isinstance(dataset, str | dict) or dataset is self.eval_dataset:
            return dataset
        samples, dataset = peek(dataset, self.args.seed)
        if said := self.first.problem(place, samples or [], labelled, scored=True):
            raise InputError(said)
        return dataset

    def _prepare_inputs(self, inputs: Any) -> Any:
        if said := self.first.too_small(inputs["pixel_values"]):
            raise InputError(f"a batch: {said}")
        return super()._prepare_inputs(inputs)


def _parts(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of a batch."""
    pixels, labels = batch.get("pixel_values"), batch.get("labels")
    if not isinstance(pixels, Tensor):
        yield dict(batch)
        return
    for index in range(len(pixels)):
        whole = isinstance(labels, Tensor | list | tuple) and index < len(labels)
        yield {
            **batch,
            "pixel_values": pixels[index],
            "labels": labels[index] if whole and labels is not None else None,
        }


def _missing(key: str, sample: Mapping[str, Any]) -> str:
    near = sorted(OTHER_NAMES[key] & set(sample))
    fix = f"rename {near[0]!r} to {key!r}" if near else "add it"
    return f"expected the key {key!r}, got {sorted(map(str, sample))[:12]}; {fix}"


def _has_pixels(sample: Any) -> bool:
    return isinstance(sample, Mapping) and isinstance(sample.get("pixel_values"), Tensor)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in values]
