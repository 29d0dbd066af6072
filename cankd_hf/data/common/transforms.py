"""Transforms that several tasks share, on uint8 tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad as constant_pad
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.batch import AREA, NORMALIZE, PLACE, TEACHER_VIEW, exact_masks
from cankd_hf.data.common.places import Place


class RandomScaleCrop(v2.Transform):
    """Resize by a random factor in `scale` (of `base_size`, or of the image's own size) and cut a random crop.

    Only the part of the image inside the crop is resized, which costs a fraction of resizing all of it, and half of
    that again where its memory is [H, W, 3], as of decoded images; the crop is contiguous [3, h, w]. A scaled image
    smaller than the crop is placed at random on a background of the colour `fill` (0..255) and the label `mask_fill`.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        scale: tuple[float, float],
        base_size: tuple[int, int] | None,
        fill: list[int],
        mask_fill: int,
    ) -> None:
        super().__init__()
        self.crop_size = crop_size
        self.scale = scale
        self.base_size = base_size
        self.background = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)
        self.mask_fill = mask_fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw scale and position; returns the box in the source, its size in the crop and the padding."""
        draw = torch.rand(3).tolist()
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * draw[0]
        own = flat_inputs[0].shape[-2:]
        box, inner, before = [], [], []
        for axis in (0, 1):
            base = self.base_size[axis] if self.base_size else own[axis]
            scaled = max(1, round(base * factor))
            size = min(self.crop_size[axis], scaled)
            first = draw[1 + axis] * (scaled - size) * own[axis] / scaled
            length = max(1, round(size * own[axis] / scaled))
            box.append((min(round(first), own[axis] - length), length))
            inner.append(size)
            before.append(int(draw[1 + axis] * (self.crop_size[axis] - size + 0.999)))
        return {"box": box, "inner": inner, "before": before, "factor": factor}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn crop to an image [3, H, W], a mask [H, W] or the place of the `whole` image."""
        (top, height), (left, width) = params["box"]
        rows, columns = params["inner"]
        up, before = params["before"]
        if isinstance(inpt, WholeImage):
            wider, higher = columns / width, rows / height  # plain numbers: tensors of four cost more than the sums
            moved = [
                (
                    (x - left) * wider + before,
                    (y - top) * higher + up,
                    (r - left) * wider + before,
                    (b - top) * higher + up,
                )
                for x, y, r, b in inpt.as_subclass(torch.Tensor)[1:].tolist()
            ]
            return _place([(before, up, before + columns, up + rows), *moved], self.crop_size)
        part = inpt.as_subclass(torch.Tensor)[..., top : top + height, left : left + width]
        if isinstance(inpt, tv_tensors.Mask):
            labels = resize_labels(part, (rows, columns))
            after = self.crop_size[1] - columns - before, self.crop_size[0] - rows - up
            padded = constant_pad(labels, (before, after[0], up, after[1]), value=self.mask_fill)
            return tv_tensors.Mask(padded)
        image = F.resize_image(part, [rows, columns], antialias=True)
        if (rows, columns) == tuple(self.crop_size):
            return tv_tensors.Image(image.contiguous())
        canvas = self.background.repeat(1, *self.crop_size)
        canvas[:, up : up + rows, before : before + columns] = image
        return tv_tensors.Image(canvas)


class WholeImage(tv_tensors.BoundingBoxes):
    """Boxes that tell where an image is after a crop and a flip, see `place_of`: what can be seen of it, all of it,
    and its left half. They are not clipped, as those of objects are."""


def whole(image: torch.Tensor) -> WholeImage:
    """The place of an image [3, H, W] before any transform."""
    height, width = image.shape[-2], image.shape[-1]
    return _place([(0, 0, width, height)] * 2 + [(0, 0, width / 2, height)], (height, width))


def _place(corners: Sequence[Sequence[float]], canvas: tuple[int, int]) -> WholeImage:
    boxes = torch.tensor(corners, dtype=torch.float32)
    return WholeImage(boxes, format="XYXY", canvas_size=tuple(canvas))  # type: ignore[call-overload]


def place_of(boxes: tv_tensors.BoundingBoxes) -> Place:
    """Where the image is, by the box of a `whole` image after a transform."""
    seen, full, half = boxes.as_subclass(torch.Tensor).tolist()
    left, top, right, bottom = map(int, seen)
    return Place((top, left, bottom, right), tuple(full), half[0] > full[0])


def placed(place: Place, canvas: tuple[int, ...], tells_place: bool) -> dict[str, tuple[float, ...]]:
    """What a transform returns of where the image is.

    Args:
        place: of the image.
        canvas: height and width of the picture.
        tells_place: whether the place of the whole image is asked for.

    Returns:
        In a picture with background the place of what can be seen of the image, (top, left, bottom, right); if asked
        for, the place of the whole image and whether it is mirrored, see `Batch`.
    """
    background = place.seen != (0, 0, *canvas)
    return {**({PLACE: place.told} if tells_place else {}), **({AREA: place.seen} if background else {})}


def flip_and_jitter(config: DataConfig) -> list[v2.Transform]:
    """The augmentation of training images after the crop."""
    strength = config.color_jitter
    jitter = [v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength)] if strength else []
    return [v2.RandomHorizontalFlip(config.flip), *jitter]


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize labels [H, W], or masks [n, H, W], to their nearest neighbour, with pixel centres aligned as in the
    image's bilinear resize.

    torchvision's own resize of masks is not aligned (it takes the upper left neighbour).
    """
    plain = labels.as_subclass(torch.Tensor)
    if tuple(plain.shape[-2:]) == tuple(size):
        return plain
    if not plain.numel():
        return plain.new_zeros(*plain.shape[:-2], *size)
    return F.resize_image(plain[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]


@dataclass(frozen=True)
class Normalize:
    """uint8 [..., 3, H, W] -> float32, normalised with the given mean and standard deviation: bit for bit what the
    image processors of transformers do, so that one saved beside a student gives what evaluation saw."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        plain = images.as_subclass(torch.Tensor)
        shift, scale = _constants(tuple(self.mean), tuple(self.std), plain.device)
        # contiguous first: arithmetic on the memory of [H, W, 3] takes several times as long
        return plain.contiguous().float().sub_(shift).div_(scale)


@lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation [3, 1, 1] of 0..255; kept, as copying them to a device would wait for it."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) * 255 for values in (mean, std))
    return shift.to(device), scale.to(device)


class ImageTransform:
    """A transform of an image [3, H, W] uint8 and its label to an item, in two parts."""

    normalize: Normalize
    strong: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # gives the student a picture of its own
    flips = False  # whether pictures are mirrored
    places = False  # whether items can tell the place of the whole image, see `Batch`
    tells_place = False  # whether they do

    def __call__(self, image: torch.Tensor, label: Any) -> dict[str, Any]:
        """The item, with `pixel_values` float32 [3, h, w], normalised, and labels of pixels as int64."""
        item = self.item(image, label)
        pictures = {key: self.normalize(item[key]) for key in ("pixel_values", TEACHER_VIEW) if key in item}
        return {**item, **pictures, **exact_masks(item)}

    def item(self, image: torch.Tensor, label: Any) -> dict[str, Any]:
        """The item as bytes, with the pictures of student and teacher where they differ."""
        item = self.unnormalized(image, label)
        return item if self.strong is None else self.strong(item)

    def size_of_scale_one(self, own: Sequence[int]) -> tuple[int, int]:
        """Height and width of an image at scale 1, by its own; for transforms that `places`."""
        raise NotImplementedError

    def unnormalized(self, image: torch.Tensor, label: Any) -> dict[str, Any]:
        """The same with `pixel_values` as uint8 and labels of pixels as they are."""
        raise NotImplementedError


class Unnormalized:
    """An `ImageTransform` whose images stay bytes; they are normalised with their batch, see `Batch`."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def __call__(self, image: torch.Tensor, label: Any) -> dict[str, Any]:
        return {**self.transform.item(image, label), NORMALIZE: self.transform.normalize}
