"""The levels that a detection head adds to those of the neck.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .configuration_cankd_fpn import DENSE_HEADS, TWO_STAGE_HEADS, FPNConfig


class ExtraConvolutions(ExtraFPNBlock):
    """Two coarser levels, each a 3x3 convolution of stride 2: of the last map of the neck or of the backbone, and of
    the first of the two, with or without a ReLU between them (MMDetection has detectors of each kind)."""

    def __init__(
        self, channels: int, width: int, of_neck: bool, relu: bool, norm: Callable[[int], nn.Module] | None
    ) -> None:
        super().__init__()
        self.of_neck, self.relu = of_neck, relu
        self.p6 = self._layer(channels, width, norm)
        self.p7 = self._layer(width, width, norm)

    @staticmethod
    def _layer(channels: int, width: int, norm: Callable[[int], nn.Module] | None) -> nn.Module:
        convolution = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=norm is None)
        return convolution if norm is None else nn.Sequential(convolution, norm(width))

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Maps of the neck and those that it was given, fine to coarse -> the first and two more."""
        sixth = self.p6((results if self.of_neck else x)[-1])
        seventh = self.p7(F.relu(sixth) if self.relu else sixth)
        return [*results, sixth, seventh], [*names, "p6", "p7"]


def coarser_levels(
    config: FPNConfig, channels: int, norm: Callable[[int], nn.Module] | None = None
) -> tuple[ExtraFPNBlock | None, list[int]]:
    """The levels a detection head adds to the backbone's, and their strides relative to its last, which has these
    `channels`; `norm` is the neck's."""
    if config.head in TWO_STAGE_HEADS:
        return LastLevelMaxPool(), [2]
    if config.head not in DENSE_HEADS:
        return None, []
    width, of_neck = config.fpn_channels, config.extra_levels == "neck"
    if of_neck and config.extra_relu and norm is None:
        return LastLevelP6P7(width, width), [2, 4]
    return ExtraConvolutions(width if of_neck else channels, width, of_neck, config.extra_relu, norm), [2, 4]
