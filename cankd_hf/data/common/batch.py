"""Collation: stacking tensors of several sizes, and batches that carry metadata about their samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.functional import pad

from cankd_hf.errors import InputError

_Collate = TypeVar("_Collate", bound=Callable[..., Any])

META = "meta"
NORMALIZE = "normalize"  # the key of an item whose image and mask are still bytes: the function that normalises images


def stack_padded(tensors: Sequence[Tensor], fill: float, multiple: int = 1) -> Tensor:
    """Stack [..., h, w] tensors, padded at the right and the bottom to the largest, rounded up to a multiple."""
    height, width = (-(-max(tensor.shape[side] for tensor in tensors) // multiple) * multiple for side in (-2, -1))
    return torch.stack(
        [
            tensor
            if tensor.shape[-2:] == (height, width)
            else pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]), value=fill)
            for tensor in tensors
        ]
    )


def as_tensors(sample: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A sample as collation and models take it: arrays become tensors, labels int64, other numbers float32.

    What is no number stays as it is, as do images of bytes, which are not normalised, and those in `dtype`, the
    student's.
    """
    made = {**sample}
    for key in ("pixel_values", "labels"):
        value = made.get(key)
        made |= {key: _tensor(value)} if isinstance(value, np.ndarray) else {}
    image, labels = made.get("pixel_values"), made.get("labels")
    if isinstance(image, Tensor) and image.is_floating_point() and image.dtype != dtype:
        made["pixel_values"] = image.float()
    if isinstance(labels, Mapping):
        made["labels"] = {key: _exact(_tensor(value)) for key, value in labels.items()}
    elif isinstance(labels, Tensor) and not labels.is_floating_point():
        made["labels"] = _exact(labels)
    return made


def _tensor(value: Any) -> Any:
    numbers = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
    return torch.as_tensor(np.ascontiguousarray(value)) if numbers else value


def _exact(value: Any) -> Any:
    """Labels in the types that losses take."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        return value
    return value.float() if value.is_floating_point() else value.long()


class Repeated(NamedTuple):
    """A sample that fills up a batch where a stream ended early for this process; it is not scored."""

    sample: Any


class Batch(dict[str, Any]):
    """A mapping, as the `Trainer` and `accelerate` expect a batch to be, in two parts.

    `inputs` goes to the model. `meta` never does; it holds for each of the B samples:

    - `sample`: its index in the training set, int64 [B]; -1 where the set does not number its samples (evaluation,
      streams).
    - `view`: the number of its augmentation, int64 [B]: the epoch. Seed, view and sample determine the augmentation.
    - `labelled`: whether it has labels, bool [B].
    - `repeated`: whether it only fills up the batch, see `Repeated`, bool [B].

    On its way from a loading process `pixel_values` and masks may still be bytes, see `unnormalized`: a quarter and an
    eighth of the memory for queues and copies to the device. The loaders of a trainer give it with normalised float32
    `pixel_values` and int64 `labels` on the device, as accelerate calls `to`.
    """

    later: "Later | None" = None  # what is still to do to images and masks

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device, its images normalised there."""
        moved = Batch(send_to_device(dict(self), device, non_blocking=non_blocking))
        if self.later is not None:
            moved |= self.later(moved)
        return moved

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's inputs by name."""
        return {name: value for name, value in self.items() if name != META}

    @property
    def meta(self) -> dict[str, Tensor]:
        """Metadata of the samples; empty for a batch that was not made by `BatchCollator`."""
        return self.get(META, {})


class Later(NamedTuple):
    """Makes numbers of the bytes of a batch: normalises its images, and sets their padding to 0, their mean, as
    collators pad normalised images."""

    normalize: Callable[[Tensor], Tensor]
    padded: list[tuple[int, int, int]]  # row in the batch, height and width of each image that has padding

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """uint8 `pixel_values` [B, 3, H, W] -> float32; `labels` of pixels -> int64."""
        images = self.normalize(batch["pixel_values"])
        for row, height, width in self.padded:
            images[row, :, height:] = 0
            images[row, :, :height, width:] = 0
        return {"pixel_values": images} | exact_masks(batch)


def takes_bytes(collate: _Collate) -> _Collate:
    """Marks a collator that takes images as bytes too, which their batch normalises on the device; others, such as
    the `collate` of a task derived from ours, get floats."""
    collate.takes_bytes = True  # type: ignore[attr-defined]
    return collate


def exact_masks(item: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of pixels, if there are any, as losses take them."""
    labels = item.get("labels")
    return {"labels": labels.to(torch.int64)} if isinstance(labels, Tensor) else {}


class BatchCollator:
    """Collates samples into a `Batch`; `collate` makes the model's inputs of samples without their `meta`.

    With `dtype`, that of the student, samples go through `as_tensors` first; a user's own collator gets them as they
    are.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]], dtype: torch.dtype | None = None) -> None:
        self.collate, self.dtype = collate, dtype

    @property
    def takes_bytes(self) -> bool:
        return self.dtype is not None and getattr(self.collate, "takes_bytes", False)

    def __call__(self, samples: Sequence[Any]) -> Batch:
        repeated = [isinstance(sample, Repeated) for sample in samples]
        samples = [item.sample if isinstance(item, Repeated) else item for item in samples]
        known = [dict(sample) if isinstance(sample, Mapping) else {} for sample in samples]
        metas = [sample.pop(META) if isinstance(sample.get(META), tuple) else (-1, 0) for sample in known]
        known = [{**item, META: own[0]} if own else item for item, (_, _, *own) in zip(known, metas, strict=True)]
        normalize = [sample.pop(NORMALIZE) for sample in known if NORMALIZE in sample]
        if self.dtype is not None and not normalize:
            known = [as_tensors(sample, self.dtype) for sample in known]
        try:
            inputs = self.collate([sample or given for sample, given in zip(known, samples, strict=True)])
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = {str(list(getattr(sample.get("pixel_values"), "shape", ()))) for sample in known}
            if len(shapes) < 2 or isinstance(error, InputError):
                raise
            said = f"{', '.join(sorted(shapes))}: {' '.join(str(error).split())[:200]}"
            raise InputError(
                f"data_collator: expected images that it puts into one batch, got the shapes {said}; resize or pad "
                "them alike"
            ) from error
        meta = {
            "sample": torch.tensor([sample for sample, *_ in metas]),
            "view": torch.tensor([view for _, view, *_ in metas]),
            "labelled": torch.tensor([sample.get("labels") is not None for sample in known]),
            "repeated": torch.tensor(repeated),
        }
        batch = Batch({**inputs, META: meta})
        if normalize:
            canvas = tuple(batch["pixel_values"].shape[-2:])
            sizes = [(row, *sample["pixel_values"].shape[-2:]) for row, sample in enumerate(known)]
            batch.later = Later(normalize[0], [(row, *size) for row, *size in sizes if tuple(size) != canvas])
        return batch
