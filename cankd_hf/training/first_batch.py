"""A look at the first samples of a data set before anything is trained, with the checks that folders get."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import InitVar, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import PredictionOutput

from cankd_hf.data.common.batch import as_tensors
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.seeds import seeded
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.common.unlabelled_stream import StreamWithUnlabelled
from cankd_hf.errors import InputError
from cankd_hf.features.strides import deepest_stride
from cankd_hf.tasks import Task
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.base import TeachingTrainer

TRAINED, EVALUATED, UNTAUGHT = "train_dataset", "eval_dataset", "train_dataset.unlabelled"
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
        own_collator: whether the user brings a collator; then only its batches are checked, the first of each kind.
    """

    task: Task
    model: InitVar[PreTrainedModel]
    mean: Sequence[float]
    std: Sequence[float]
    own_collator: bool = False

    def __post_init__(self, model: PreTrainedModel) -> None:
        self.stride = deepest_stride(model) or 1.0
        self.taught = self.labelled = True  # whether labels are needed in training and in evaluation
        self.seen: set[str] = set()  # kinds of data set of which a batch of the user's collator was checked

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
        named_so = "labels" in (args.label_names or ["labels"])
        self.taught = named_so and task_weight > 0
        self.labelled = named_so and given.get("compute_metrics") is None
        problems: list[str] = []
        size: tuple[int, int] | None = None
        kept = {}
        trained = given.get(TRAINED)
        parts = {TRAINED: trained}
        if isinstance(trained, WithUnlabelled | StreamWithUnlabelled):
            parts = {TRAINED: trained.labelled, UNTAUGHT: trained.unlabelled}
        for place, dataset in {**parts, **named}.items():
            samples, kept[place] = peek(dataset, args.seed, place)
            scored = place in named
            labelled = self.labelled if scored else self.taught and place != UNTAUGHT
            if samples is not None and (said := self.problem(place, samples, labelled, scored)):
                problems.append(said)
            elif size is None and samples:
                size = _size(samples["[0]"])
        if problems:
            raise InputError(problems)
        if isinstance(trained, WithUnlabelled | StreamWithUnlabelled):
            given[TRAINED] = type(trained)(kept[TRAINED], kept[UNTAUGHT], trained.ratio)
        elif trained is not None:
            given[TRAINED] = kept[TRAINED]
        if evaluated is not None:
            sets = [kept[place] for place in named]
            given[EVALUATED] = sets[0] if several is None else dict(zip(several, sets, strict=True))
        return size or (224, 224)

    def problem(self, place: str, samples: Mapping[str, Any], labelled: bool, scored: bool) -> str | None:
        """The first thing that is wrong with samples of a data set, if any.

        Args:
            place: the data set's name in messages.
            samples: some of them by their places in it, from `peek`.
            labelled: whether they need labels.
            scored: whether they are for evaluation.
        """
        if not samples:
            return f"{place}: expected at least one sample, got none"
        if self.own_collator:  # which may make anything of them, and is not called before its time
            return None
        return self._first(place, samples, labelled, scored)

    def batch_problem(self, place: str, batch: Mapping[str, Any], labelled: bool, scored: bool) -> str | None:
        """The same for a batch."""
        if not isinstance(batch, Mapping):
            return f"data_collator: expected a dict with pixel_values and labels, got {type(batch).__name__}"
        samples = {f", sample {index} of the first batch": part for index, part in enumerate(_parts(batch))}
        return self._first(place, samples, labelled, scored)

    def too_small(self, pixel_values: Tensor) -> str | None:
        """The problem with images [..., H, W] of fewer pixels than the student's deepest stride, if they are."""
        height, width = pixel_values.shape[-2:]
        if min(height, width) >= self.stride - 1e-3:
            return None
        return (
            f"pixel_values: expected images of at least {self.stride:g} x {self.stride:g} pixels, the deepest stride "
            f"of the student, got {height} x {width}; enlarge them (data.image_size, data.crop_size)"
        )

    def _first(self, place: str, samples: Mapping[str, Any], labelled: bool, scored: bool) -> str | None:
        found = ((name, self._of(sample, labelled, scored)) for name, sample in samples.items())
        return next((f"{place}{name}: {said}" for name, said in found if said), None)

    def _of(self, sample: Any, labelled: bool, scored: bool) -> str | None:
        """The problem with one sample, if any."""
        if not isinstance(sample, Mapping):
            return f"expected a dict with pixel_values and labels, got {type(sample).__name__}"
        if "pixel_values" not in sample:
            return _missing("pixel_values", sample)
        if not self.own_collator:
            sample = as_tensors(sample)
        if said := self._of_pixels(sample["pixel_values"]):
            return said
        if sample.get("labels") is None:
            without = "" if scored else ", or set task_weight=0 to train without"
            return _missing("labels", sample) + without if labelled and self.task.takes_labels else None
        return self.task.label_problem(sample["labels"], tuple(sample["pixel_values"].shape[-2:]), scored)

    def _of_pixels(self, pixels: Any) -> str | None:
        if not isinstance(pixels, Tensor):
            got = f"{type(pixels).__name__}; convert it, such as by .with_format('torch')"
            return f"pixel_values: expected a tensor [3, H, W], got {got}"
        shape = list(pixels.shape)
        if pixels.ndim != 3 or shape[0] != 3:
            last = pixels.ndim == 3 and shape[2] == 3
            fix = "move the channels to the front: .permute(2, 0, 1)" if last else "give one RGB image a sample"
            return f"pixel_values: expected [3, H, W], got the shape {shape}; {fix}"
        if said := self.too_small(pixels):
            return said
        if not pixels.is_floating_point():
            return (
                f"pixel_values: expected normalised floating point numbers, got {pixels.dtype}; use the student's "
                "image processor, or (pixels / 255 - mean) / std"
            )
        if not pixels.isfinite().all():
            return f"pixel_values: expected finite numbers, got {int((~pixels.isfinite()).sum())} others (NaN or inf)"
        bounds = [abs((value - m) / s) for m, s in zip(self.mean, self.std, strict=True) for value in (0.0, 1.0)]
        most = float(pixels.detach().abs().max())
        if most > FAR * max(bounds):
            return (
                f"pixel_values: expected pixels normalised with the mean {_rounded(self.mean)} and std "
                f"{_rounded(self.std)}, at most about {max(bounds):.1f}, got {most:.4g}; divide 0..255 by 255 first"
            )
        return None


def peek(dataset: Any, seed: int, place: str = TRAINED) -> tuple[dict[str, Any] | None, Any]:
    """The first samples of a data set by their places, and the data set to go on with; (None, None) for none.

    Of an `ImageDataset` also those that a model is the least likely to take.

    No random number is drawn from the global generators.
    """
    if dataset is None:
        return None, None
    if isinstance(dataset, Mapping) or not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
        raise InputError(f"{place}: expected a data set, got {type(dataset).__name__}")
    with seeded(seed):
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            iterator = iter(dataset)
            once = iterator is iter(dataset)
            taken = list(itertools.islice(iterator, 1))
            return {f"[{n}]": sample for n, sample in enumerate(taken)}, PutBack(taken, dataset) if once else dataset
        indexed: Any = dataset
        samples = {f"[{index}]": indexed[index] for index in range(min(LOOKED_AT, len(dataset)))}
        if isinstance(dataset, ImageDataset):
            samples |= {f"[{index}] ({dataset.name(index)})": dataset[index] for index in dataset.extremes}
        return samples, dataset


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
        dataset = self._looked_at(EVALUATED, eval_dataset, self.first.labelled)
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
        samples, dataset = peek(dataset, self.args.seed, place)
        if said := self.first.problem(place, samples or {}, labelled, scored=True):
            raise InputError(said)
        return dataset

    def _prepare_inputs(self, inputs: Any) -> Any:
        first, training = self.first, cast(torch.nn.Module, self.model).training
        place = TRAINED if training else EVALUATED
        problem = None
        if first.own_collator and place not in first.seen:
            first.seen.add(place)
            unread = isinstance(inputs, Mapping) and training and not first.taught
            read = {**inputs, "labels": None} if unread else inputs
            problem = first.batch_problem(place, read, training and first.taught, scored=not training)
        elif isinstance(inputs, Mapping) and isinstance(inputs.get("pixel_values"), Tensor):
            problem = first.too_small(inputs["pixel_values"])
            problem = problem and f"{place}: {problem}"
        if problem:
            raise InputError(problem)
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


def _size(sample: Any) -> tuple[int, int] | None:
    """(height, width) of the image of a sample, if it is one as the student takes it."""
    pixels = sample.get("pixel_values") if isinstance(sample, Mapping) else None
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or pixels.shape[0] != 3:
        return None
    return int(pixels.shape[1]), int(pixels.shape[2])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 3) for value in values]
