"""Joint transforms of image and mask, on uint8 tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.soft import SoftMask, drawn, hard
from cankd_hf.data.common.transforms import (
    ImageTransform,
    Normalize,
    RandomScaleCrop,
    flip_and_jitter,
    place_of,
    placed,
    whole,
)


class TrainTransform(ImageTransform):
    """Random scale, crop, flip and colour, then normalisation with the student's statistics.

    Called with image [3, H, W] uint8 and mask [H, W] or None, it returns `pixel_values` float32 [3, h, w] and, with a
    mask, `labels` int64 [h, w].
    """

    scale_crop: Callable[..., RandomScaleCrop] = RandomScaleCrop
    places = True

    def __init__(self, config: DataConfig, ignore_index: int = 255) -> None:
        fill = [round(255 * value) for value in config.image_mean]
        crop = config.crop_size or config.image_size
        steps: list[v2.Transform] = []
        self.flips, self.base = config.flip > 0, config.image_size
        if crop is not None:
            base = config.image_size and (config.image_size[0], config.image_size[1])
            scale = (config.scale[0], config.scale[1])
            steps.append(self.scale_crop((crop[0], crop[1]), scale, base or None, fill, ignore_index))
        self.augment = v2.Compose([*steps, *flip_and_jitter(config)])
        self.normalize = Normalize(config.image_mean, config.image_std)

    def size_of_scale_one(self, own: Sequence[int]) -> tuple[int, int]:
        height, width = self.base or own
        return height, width

    def unnormalized(self, image: torch.Tensor, label: torch.Tensor | SoftMask | None) -> dict[str, Any]:
        masks = label.masks() if isinstance(label, SoftMask) else [] if label is None else [label]
        made = self.augment(tv_tensors.Image(image), whole(image), *map(tv_tensors.Mask, masks))
        picture, *masks = (one.as_subclass(torch.Tensor) for one in (made[0], *made[2:]))
        place = place_of(made[1])
        item = {"pixel_values": picture, **placed(place, picture.shape[-2:], self.tells_place)}
        if masks:
            item["labels"] = drawn(label, masks, place) if isinstance(label, SoftMask) else masks[0]
        return item


class EvalTransform(ImageTransform):
    """Resize to `image_size` and normalise; the mask keeps its own size, at which it is scored."""

    def __init__(self, config: DataConfig) -> None:
        self.size = config.image_size
        self.normalize = Normalize(config.image_mean, config.image_std)

    def unnormalized(self, image: torch.Tensor, label: torch.Tensor | SoftMask | None) -> dict[str, Any]:
        if self.size is not None and list(image.shape[-2:]) != list(self.size):
            image = F.resize_image(image, list(self.size), antialias=True)
        item = {"pixel_values": image}
        if label is not None:
            item["labels"] = hard(label)
        return item
