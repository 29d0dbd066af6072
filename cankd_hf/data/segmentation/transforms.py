"""Joint transforms of image and mask, on uint8 tensors."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.transforms import Normalize, RandomScaleCrop, flip_and_jitter


class TrainTransform:
    """Random scale, crop, flip and colour, then normalisation with the student's statistics.

    Called with image [3, H, W] uint8 and mask [H, W] or None, it returns `pixel_values` float32 [3, h, w] and, with a
    mask, `labels` int64 [h, w].
    """

    def __init__(self, config: DataConfig, ignore_index: int = 255) -> None:
        fill = [round(255 * value) for value in config.image_mean]
        crop = config.crop_size or config.image_size
        steps: list[v2.Transform] = []
        if crop is not None:
            base = config.image_size and (config.image_size[0], config.image_size[1])
            scale = (config.scale[0], config.scale[1])
            steps.append(RandomScaleCrop((crop[0], crop[1]), scale, base or None, fill, ignore_index))
        self.augment = v2.Compose([*steps, *flip_and_jitter(config)])
        self.normalize = Normalize(config.image_mean, config.image_std)

    def __call__(self, image: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        picture = tv_tensors.Image(image)
        if mask is None:
            return {"pixel_values": self.normalize(self.augment(picture))}
        picture, labels = self.augment(picture, tv_tensors.Mask(mask))
        return {"pixel_values": self.normalize(picture), "labels": _to_int64(labels)}


class EvalTransform:
    """Resize to `image_size` and normalise; the mask keeps its own size, at which it is scored."""

    def __init__(self, config: DataConfig) -> None:
        self.size = config.image_size
        self.normalize = Normalize(config.image_mean, config.image_std)

    def __call__(self, image: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if self.size is not None and list(image.shape[-2:]) != list(self.size):
            image = F.resize_image(image, list(self.size), antialias=True)
        item = {"pixel_values": self.normalize(image)}
        if mask is not None:
            item["labels"] = _to_int64(mask)
        return item


def _to_int64(labels: torch.Tensor) -> torch.Tensor:
    return labels.as_subclass(torch.Tensor).to(torch.int64)
