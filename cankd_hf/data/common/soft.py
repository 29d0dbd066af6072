"""Soft masks: a teacher's class probabilities for every pixel, from which each view of a sample draws its labels.

A label drawn anew for each pixel and view makes any loss over labels, in expectation, the loss over the teacher's
probabilities: E[-log q(y)], y ~ p, is the cross entropy of q with p, which is KL(p || q) up to a constant. So
students of every kind learn from them, those of `transformers` too, whose loss takes one label a pixel.

Stored are logits less the largest, in steps of 1/16 from 0 down to -16, on the teacher's own grid: its KL error is at
most 7e-5, that of probabilities in a byte .002 to .06 (docs/label.md).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from cankd_hf.data.common.decode import Data, Decoder, Sample, Unusable
from cankd_hf.data.common.folders import FolderSource
from cankd_hf.data.common.places import Place, bilinear
from cankd_hf.data.common.seeds import for_the_student
from cankd_hf.data.common.targets import Mask, Summary

KEY = "soft_file_name"  # in metadata.jsonl
STEPS = 255 / 16  # of a byte, in one nat
RARE = 1e-5  # a class whose probability is below this in all of a picture is never drawn there


def levels_of(logits: Tensor) -> Tensor:
    """Logits [K, h, w] -> how far each is below the largest, uint8 [K, h, w]; 0 is the likeliest class."""
    below = logits.float().amax(0, keepdim=True) - logits.float()
    return (below * STEPS).round().clamp(0, 255).to(torch.uint8)


def probabilities(levels: Tensor) -> Tensor:
    """What `levels_of` stored, as float32 probabilities [K, h, w]."""
    return (levels.float() / -STEPS).softmax(0)


def upsampled(probability: Tensor, size: Sequence[int]) -> Tensor:
    """Probabilities [h, w] of one class, or [K, h, w], at the size of the image."""
    planes = probability.reshape(1, -1, *probability.shape[-2:])
    wide = interpolate(planes, size=(size[0], size[1]), mode="bilinear", align_corners=False)
    return wide[0].reshape(*probability.shape[:-2], *size)


def likeliest(levels: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The likeliest class of each pixel of an image of this size, int64 [H, W], and its probability, float32."""
    share, present = _present(levels)
    best, places = torch.zeros(*size), torch.zeros(*size, dtype=_small(len(present)))
    for place, plane in enumerate(share):
        value = upsampled(plane, size)
        places.masked_fill_(value > best, place)
        torch.maximum(best, value, out=best)
    return present[places.long()], best


def _present(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [n, h, w] of the classes that are not as good as nowhere, and these, int64 [n]."""
    share = probabilities(levels)
    present = (share.amax((1, 2)) > RARE).nonzero()[:, 0]
    return share[present], present


def _small(count: int) -> torch.dtype:
    """The smallest type of numbers below `count`: what is done to whole images takes as long as they are wide."""
    return torch.uint8 if count <= 256 else torch.int32


def to_png(levels: Tensor) -> bytes:
    """A grey picture with the classes one below the other."""
    buffer = io.BytesIO()
    Image.fromarray(levels.flatten(0, 1).numpy()).save(buffer, format="png")
    return buffer.getvalue()


def read_levels(data: Data, name: str, num_labels: int, max_pixels: int) -> Tensor:
    """The content of a file of `to_png`. Raises Unusable for any other picture."""
    picture = Decoder(max_pixels * num_labels).picture(data, name)
    if picture.mode != "L" or picture.height % num_labels:
        raise Unusable(
            f"{name}: expected soft labels of {num_labels} classes, one below the other, got a picture of mode "
            f"{picture.mode} and {picture.width} x {picture.height}; write the set again with `cankd label --soft`"
        )
    rows = picture.height // num_labels
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(num_labels, rows, picture.width)


@dataclass(frozen=True)
class SoftMask:
    """A mask with the teacher's probabilities behind it.

    Where a person has changed the mask, which then is not the likeliest class any more, the mask counts.

    Attributes:
        labels: [H, W], as in `Mask`.
        levels: uint8 [K, h, w], of `levels_of`.
        teachers: bool [H, W], the pixels that are labelled by the teacher.
        ignore_index: of the mask.
    """

    labels: Tensor
    levels: Tensor
    teachers: Tensor
    ignore_index: int = 255

    @property
    def value(self) -> SoftMask:
        """What transforms get: itself."""
        return self

    def standing_in(self) -> Mask:
        """A mask with all pixels void, ignored in losses and scores."""
        return Mask(self.labels, self.ignore_index).standing_in()

    def summary(self) -> Summary:
        """That of its mask."""
        return Mask(self.labels, self.ignore_index).summary()

    def masks(self) -> list[Tensor]:
        """What a transform moves with the image, [H, W] each: the mask, and where it is 1 the teacher's pixels."""
        return [self.labels, self.teachers.to(self.labels.dtype)]

    def drawn(self) -> Tensor:
        """A draw for the whole image, [H, W]."""
        height, width = self.labels.shape
        return self.drawn_in(self.masks(), Place((0, 0, height, width), (0, 0, width, height), False))

    def drawn_in(self, masks: Sequence[Tensor], place: Place) -> Tensor:
        """Labels [h, w] in which each pixel of the teacher's is drawn from its probabilities, by torch's generator.

        Args:
            masks: of `masks`, after the transform of a picture [h, w].
            place: of the image in the picture; background stays as it is.
        """
        (top, left, bottom, right), (first, upper, last, lower), mirrored = place
        levels = self.levels.flip(-1) if mirrored else self.levels
        rows, down = bilinear(torch.arange(top, bottom) + 0.5, upper, lower, levels.shape[1])
        columns, across = bilinear(torch.arange(left, right) + 0.5, first, last, levels.shape[2])
        share, present = _present(levels[:, rows, columns])
        below = share.cumsum(0)
        bounds = down @ ((below / below[-1:])[:-1] @ across.T)
        labels = masks[0].clone()
        area, teachers = labels[top:bottom, left:right], masks[1][top:bottom, left:right] == 1
        drawn, found = torch.rand(area.shape), torch.full_like(area, int(present[0]))
        for bound, step in zip(bounds, present.diff().tolist(), strict=True):
            found.add_((drawn >= bound).to(found.dtype), alpha=step)
        area.copy_(torch.where(teachers, found, area))
        return labels


def drawn(label: SoftMask, masks: Sequence[Tensor], place: Place) -> Tensor:
    """The label that a training view sees: drawn anew in each epoch, and apart from what the teacher sees."""
    with for_the_student():
        return label.drawn_in(masks, place)


def hard(label: Any) -> Any:
    """The label that is scored: of a `SoftMask` its mask, any other as it is."""
    return label.labels if isinstance(label, SoftMask) else label


@dataclass(eq=False)
class SoftSource(FolderSource):
    """Images of a folder with masks, some of which have soft labels: `soft` holds their names, "" for the others."""

    soft: list[str] = field(default_factory=list)

    def load(self, index: int) -> Sample:
        sample, name = super().load(index), self.soft[index]
        if not name or not isinstance(sample.target, Mask):
            return sample
        levels = read_levels(self.rows.root / name, name, self.decoder.num_labels or 1, self.decoder.max_pixels)
        mask = sample.target
        teachers = mask.value == likeliest(levels, mask.value.shape)[0]
        return sample._replace(target=SoftMask(mask.value, levels, teachers, mask.ignore_index))
