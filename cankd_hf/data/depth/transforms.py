"""Joint transforms of image and depth map."""

from typing import Any

import torch
from torchvision import tv_tensors

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.transforms import RandomScaleCrop
from cankd_hf.data.segmentation.transforms import TrainTransform


class DepthScaleCrop(RandomScaleCrop):
    """`RandomScaleCrop` of images with depth in metres: what is enlarged by a factor is as much nearer.

    A picture enlarged by `s` is the one that the same camera takes at `1/s` of the distance, up to perspective (Ma and
    Karaman 2018, arXiv:1709.07492, section III-E). Depth maps are resized by their nearest neighbours, so that no
    distance is made up between two objects, and none is mixed with pixels that have no depth.
    """

    metric = True
    limit: float | None = None  # metres; what is farther afterwards counts as unknown

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        made = super().transform(inpt, params)
        if not (self.metric and isinstance(inpt, tv_tensors.Mask)):
            return made
        depth = made.as_subclass(torch.Tensor) / params["factor"]
        if self.limit is not None:
            depth = depth.masked_fill(depth > self.limit, 0)
        return tv_tensors.Mask(depth)


class DepthTrainTransform(TrainTransform):
    """Random scale, crop, flip and colour, then normalisation with the student's statistics.

    Called with image [3, H, W] uint8 and depth [H, W] in metres or None, it returns `pixel_values` float32 [3, h, w]
    and, with a depth map, `labels` float32 [h, w], 0 where there is none.
    """

    scale_crop = DepthScaleCrop

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config, ignore_index=0)
        for step in self.augment.transforms:
            if isinstance(step, DepthScaleCrop):
                step.metric, step.limit = config.depth.kind == "metric", config.depth.max
