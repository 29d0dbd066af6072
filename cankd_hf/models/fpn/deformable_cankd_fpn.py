"""ResNets with deformable convolutions (Dai et al. 2017), which some of MMDetection's weights have (`*_dconv_*`).

This file travels with every saved student (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
"""

import re
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Module):
    """In place of a 3x3 convolution: samples the map at places that a convolution of its own predicts, 0 at first.

    Args:
        replaced: the convolution, whose weight it takes over.
    """

    def __init__(self, replaced: nn.Conv2d) -> None:
        super().__init__()
        self.weight = replaced.weight
        places: dict[str, Any] = {
            "stride": replaced.stride,
            "padding": replaced.padding,
            "dilation": replaced.dilation,
        }
        self.places = places
        self.conv_offset = nn.Conv2d(replaced.in_channels, 2 * 9, 3, **places)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` -> map; in float32, which torchvision's operator needs on some devices."""
        if x.is_meta:  # the shape alone is asked for, which torchvision's operator cannot tell
            return F.conv2d(x, self.weight, groups=x.shape[1] // self.weight.shape[1], **self.places)
        offsets = self.conv_offset(x)
        with torch.autocast(x.device.type, enabled=False):
            return deform_conv2d(x.float(), offsets.float(), self.weight.float(), **self.places).to(x.dtype)


def deform(backbone: nn.Module, stages: Collection[int]) -> None:
    """Makes the 3x3 convolution of each block of these stages (1 to 4) of a ResNet of timm's a deformable one.

    Raises:
        ValueError: if there is no such stage.
    """
    for stage in stages:
        names = [name for name, _ in backbone.named_modules() if re.search(rf"layer{stage}\.\d+\.conv2$", name)]
        if not names:
            raise ValueError(
                f"FPNConfig.deformable_stages: {type(backbone).__name__} has no blocks layer{stage}.N.conv2"
            )
        for name in names:
            convolution = backbone.get_submodule(name)
            assert isinstance(convolution, nn.Conv2d)
            backbone.set_submodule(name, DeformableConv2d(convolution))
