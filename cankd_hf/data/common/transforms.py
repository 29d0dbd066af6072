"""Transforms that several tasks share, on uint8 tensors."""

from typing import Any

import torch
from torch.nn.functional import pad as constant_pad
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from cankd_hf.config.data import DataConfig


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
        return {"box": box, "inner": inner, "before": before}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn crop to an image [3, H, W] or a mask [H, W]."""
        (top, height), (left, width) = params["box"]
        part = inpt.as_subclass(torch.Tensor)[..., top : top + height, left : left + width]
        rows, columns = params["inner"]
        up, before = params["before"]
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


def flip_and_jitter(config: DataConfig) -> list[v2.Transform]:
    """The augmentation of training images after the crop."""
    strength = config.color_jitter
    jitter = [v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength)] if strength else []
    return [v2.RandomHorizontalFlip(config.flip), *jitter]


def resize_labels(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize labels [H, W] to their nearest neighbour, with pixel centres aligned as in the image's bilinear resize.

    torchvision's own resize of masks is not aligned (it takes the upper left neighbour).
    """
    plain = labels.as_subclass(torch.Tensor)
    if tuple(plain.shape) == tuple(size):
        return plain
    return F.resize_image(plain[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]


class Normalize:
    """uint8 [3, H, W] -> float32, normalised with the given mean and standard deviation: bit for bit what the image
    processors of transformers do, so that one saved beside a student gives what evaluation saw."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.shift = torch.tensor(mean).view(3, 1, 1) * 255
        self.scale = torch.tensor(std).view(3, 1, 1) * 255

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        plain = image.as_subclass(torch.Tensor)
        # contiguous first: arithmetic on the memory of [H, W, 3] takes several times as long
        return plain.contiguous().float().sub_(self.shift).div_(self.scale)
