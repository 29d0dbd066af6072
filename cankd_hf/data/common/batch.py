"""Collation: stacking tensors of several sizes, and batches that carry metadata about their samples."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.functional import pad

from cankd_hf.data.common.mixing import Drawn, erase, mix_plan, paste, within_areas
from cankd_hf.errors import InputError

_Collate = TypeVar("_Collate", bound=Callable[..., Any])

META = "meta"
NORMALIZE = "normalize"  # the key of an item whose image and mask are still bytes: the function that normalises images
TEACHER_VIEW = "teacher_pixel_values"  # the teacher's picture of a sample, or of a batch, where it is another one
AREA = "picture_area"  # of an item: (top, left, bottom, right) of the image within its padding
PLACE = "place"  # of an item, and of a batch: where the whole image lies, see `Batch`
CONTENT = "content"  # of an item: a hash of the whole image before any transform
DRAWN = "drawn"  # of an item: what is done to the student's picture with its batch
OF_PICTURES = (TEACHER_VIEW, AREA, PLACE, CONTENT, DRAWN)
PICTURES = "pictures"  # of a batch: what identifies each picture of the teacher


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
    for key in ("pixel_values", TEACHER_VIEW, "labels"):
        value = made.get(key)
        made |= {key: _tensor(value)} if isinstance(value, np.ndarray) else {}
    for key in ("pixel_values", TEACHER_VIEW):
        image = made.get(key)
        if isinstance(image, Tensor) and image.is_floating_point() and image.dtype != dtype:
            made[key] = image.float()
    labels = made.get("labels")
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
    - `valid`: whether a pixel belongs to the picture, not to its padding, bool [B, H, W]; absent if all do.
    - `place`: where teachers' answers for whole images are stored: left, top, right and bottom of the whole image, in
      pixels of this picture, which shows a part of it, and whether it is mirrored, float32 [B, 5].

    and, where the student's pictures differ from the teacher's (`data.strong`):

    - `mix`: (partner's row or -1, top, left, bottom, right) of the rectangle that was pasted from the partner into the
      student's picture, int64 [B, 5]; the teacher's pictures are not mixed, its outputs are, see `mix_outputs`.
    - `seen`: whether the student sees a pixel: False in padding and where its picture was erased, bool [B, H, W];
      absent if it sees all.

    `pixel_values` is what the student sees. `teacher_pixel_values` [B, 3, H, W], see `teacher_images`, is what the
    teachers see where it differs: the same geometry, normalised with the student's statistics too.

    `pictures`, where teachers are stored, is a list of B hashes of what the teachers see, see `identities`; of
    the whole image, mirrored or not, where their answers for these are stored.

    On its way from a loading process pictures and masks may still be bytes, see `unnormalized`: a quarter and an
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
        return {name: value for name, value in self.items() if name not in (META, TEACHER_VIEW, PICTURES)}

    @property
    def teacher_images(self) -> Tensor:
        """What the teachers see, [B, 3, H, W]."""
        images: Tensor = self.get(TEACHER_VIEW, self["pixel_values"])
        return images

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
        """uint8 pictures [B, 3, H, W] -> float32; `labels` of pixels -> int64."""
        made = {key: self.normalize(batch[key]) for key in ("pixel_values", TEACHER_VIEW) if key in batch}
        for images in made.values():
            for row, height, width in self.padded:
                images[row, :, height:] = 0
                images[row, :, :height, width:] = 0
        return made | exact_masks(batch)


def takes_bytes(collate: _Collate) -> _Collate:
    """Marks a collator that takes images as bytes too, which their batch normalises on the device; others, such as
    the `collate` of a task derived from ours, get floats."""
    collate.takes_bytes = True  # type: ignore[attr-defined]
    return collate


def exact_masks(item: Mapping[str, Any]) -> dict[str, Any]:
    """Labels that are one tensor, as losses take them: class ids as int64, measured values as float32."""
    labels = item.get("labels")
    if not isinstance(labels, Tensor):
        return {}
    return {"labels": labels.to(torch.float32 if labels.is_floating_point() else torch.int64)}


class BatchCollator:
    """Collates samples into a `Batch`; `collate` makes the model's inputs of samples without their `meta`.

    With `dtype`, that of the student, samples go through `as_tensors` first; a user's own collator gets them as they
    are. Pictures with `Drawn` rectangles are erased and mixed here, in multiples of `stride`; labels follow by
    `mix_labels(labels, seen, plan)`, see `Task.mix_labels`.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        dtype: torch.dtype | None = None,
        mix_labels: Callable[[Any, Tensor, Sequence[Sequence[int]]], Any] | None = None,
    ) -> None:
        self.collate, self.dtype, self.mix_labels = collate, dtype, mix_labels
        self.stride = 32  # the coarsest that is compared; set by the trainer
        self.identifies = self.identifies_whole = False

    def identifying(self, whole: bool = False) -> "BatchCollator":
        """The same, whose batches have the identities of their pictures, for stored teachers; with `whole` those of
        the images that they show a part of, and their places."""
        made = copy.copy(self)
        made.identifies, made.identifies_whole = True, whole
        return made

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
        pictures = [{key: sample.pop(key) for key in OF_PICTURES if key in sample} for sample in known]
        inputs = self._collated([sample or given for sample, given in zip(known, samples, strict=True)])
        meta = {
            "sample": torch.tensor([sample for sample, *_ in metas]),
            "view": torch.tensor([view for _, view, *_ in metas]),
            "labelled": torch.tensor([sample.get("labels") is not None for sample in known]),
            "repeated": torch.tensor(repeated),
        }
        batch = Batch({**inputs, META: meta})
        sizes = _sizes(known, batch.get("pixel_values"))
        if sizes is not None:
            canvas = tuple(batch["pixel_values"].shape[-2:])
            mean = getattr(normalize[0], "mean", None) if normalize else None
            self._finish(batch, [sample["pixel_values"] for sample in known], pictures, sizes, mean)
            if normalize:
                batch.later = Later(
                    normalize[0], [(row, *size) for row, size in enumerate(sizes) if tuple(size) != canvas]
                )
        if self.identifies_whole and all(PLACE in own for own in pictures):  # not those of other sets
            places = torch.tensor([own[PLACE] for own in pictures])
            batch[PICTURES] = [oriented(own[CONTENT], bool(own[PLACE][-1])) for own in pictures]
            meta[PLACE] = places
        elif self.identifies and isinstance(batch.get("pixel_values"), Tensor):
            batch[PICTURES] = identities(batch.teacher_images, sizes)
        return batch

    def _collated(self, samples: list[Any]) -> Mapping[str, Any]:
        try:
            return self.collate(samples)
        except (RuntimeError, ValueError, TypeError) as error:
            known = [sample if isinstance(sample, Mapping) else {} for sample in samples]
            shapes = {str(list(getattr(sample.get("pixel_values"), "shape", ()))) for sample in known}
            if len(shapes) < 2 or isinstance(error, InputError):
                raise
            said = f"{', '.join(sorted(shapes))}: {' '.join(str(error).split())[:200]}"
            raise InputError(
                f"data_collator: expected images that it puts into one batch, got the shapes {said}; resize or pad "
                "them alike"
            ) from error

    def _finish(
        self,
        batch: Batch,
        images: Sequence[Tensor],
        pictures: Sequence[Mapping[str, Any]],
        sizes: Sequence[tuple[int, int]],
        mean: Sequence[float] | None,
    ) -> None:
        """Adds the teacher's pictures and which pixels count, and erases and mixes the student's pictures."""
        meta, canvas = batch.meta, (batch["pixel_values"].shape[-2], batch["pixel_values"].shape[-1])
        areas = [own.get(AREA, (0, 0, *size)) for own, size in zip(pictures, sizes, strict=True)]
        valid = within_areas(areas, canvas)
        if any(TEACHER_VIEW in own for own in pictures):
            views = [own.get(TEACHER_VIEW, image) for own, image in zip(pictures, images, strict=True)]
            batch[TEACHER_VIEW] = _on_canvas(views, canvas)
        if any(DRAWN in own for own in pictures):
            drawn = [own.get(DRAWN, Drawn()) for own in pictures]
            fill = torch.tensor([0.0] * 3 if mean is None else [round(255 * value) for value in mean]).view(3, 1, 1)
            seen = torch.ones(len(images), *canvas, dtype=torch.bool) if valid is None else valid
            plan = mix_plan(drawn, sizes, meta["labelled"].tolist(), self.stride)
            batch["pixel_values"] = paste(erase(batch["pixel_values"], drawn, sizes, self.stride, fill), plan)
            seen = erase(seen, drawn, sizes, self.stride, False)
            if self.mix_labels is not None and batch.get("labels") is not None:
                batch["labels"] = self.mix_labels(batch["labels"], seen, plan)
            valid, seen = None if valid is None else paste(valid, plan), paste(seen, plan)
            meta["mix"] = torch.tensor(plan)
            if not seen.all():
                meta["seen"] = seen
        if valid is not None:
            meta["valid"] = valid


def identities(images: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> list[bytes]:
    """What identifies each picture of a batch: 128-bit hashes of all that a teacher's answer for it depends on.

    Args:
        images: what the teachers see, [B, 3, H, W], with its padding.
        sizes: (height, width) of each picture without its padding, where that is known.
    """
    known = [()] * len(images) if sizes is None else sizes
    return [content_hash(image, *size) for image, size in zip(images, known, strict=True)]


def content_hash(image: Tensor, *facts: int) -> bytes:
    """A 128-bit hash of an image, its size, and what else is known of it."""
    digest = hashlib.blake2b(repr((str(image.dtype), *image.shape, *facts)).encode(), digest_size=16)
    digest.update(image.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def oriented(content: bytes, mirrored: bool) -> bytes:
    """What identifies an image, mirrored or not, by the hash of its content."""
    return hashlib.blake2b(content + bytes([mirrored]), digest_size=16).digest()


def _on_canvas(images: Sequence[Tensor], canvas: tuple[int, int]) -> Tensor:
    """Images [3, h, w] in a batch of this size, padded with 0 at the right and the bottom."""
    made = images[0].new_zeros(len(images), 3, *canvas)
    for row, image in enumerate(images):
        made[row, :, : image.shape[-2], : image.shape[-1]] = image
    return made


def _sizes(samples: Sequence[Mapping[str, Any]], images: Any) -> list[tuple[int, int]] | None:
    """(height, width) of the image of each sample; None where a user's collator does something else with them."""
    own = [sample.get("pixel_values") for sample in samples]
    if not (isinstance(images, Tensor) and images.ndim == 4 and len(images) == len(own)):
        return None
    if not all(isinstance(image, Tensor) and image.ndim == 3 for image in own):
        return None
    return [(int(image.shape[-2]), int(image.shape[-1])) for image in own if image is not None]
