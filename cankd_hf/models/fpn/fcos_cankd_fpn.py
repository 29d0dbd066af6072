"""The heads of FCOS (Tian et al. 2019): torchvision's, and one with the conventions of MMDetection's weights.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, C channels, H and W of that map, A points.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

from .configuration_cankd_fpn import FPNConfig
from .modeling_cankd_fpn import make_norm

PRIOR = 0.01  # probability of an object at an anchor, before training: the focal loss starts small


class FittedFCOSHead(FCOSHead):
    """torchvision's head, whose norms have fewer than 32 groups where the maps are narrow."""

    def __init__(self, channels: int, num_classes: int, layers: int) -> None:
        nn.Module.__init__(self)
        norm = partial(make_norm, "group")
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(channels, 1, num_classes, layers, PRIOR, norm)
        self.regression_head = FCOSRegressionHead(channels, 1, layers, norm)


class ScaledFCOSHead(FittedFCOSHead):
    """The head of OpenMMLab's FCOS: distances have a learned factor for each level, and may be exponentials."""

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        super().__init__(config.fpn_channels, config.num_labels, config.head_layers)
        self.strides, self.exponential = list(strides), config.distances == "exponential"
        self.rates_classes = config.centerness_on == "classification"
        self.level_scales = nn.Parameter(torch.ones(len(strides)))

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """As `FCOSHead.forward`: maps `[B, C, H, W]` -> `[B, A, ...]`."""
        levels = [self.at_level(one, level) for level, one in enumerate(x)]
        return {name: torch.cat([one[name] for one in levels], dim=1) for name in levels[0]}

    def at_level(self, x: Tensor, level: int) -> dict[str, Tensor]:
        """The outputs of one level; distances in its strides."""
        classes, boxes = self.classification_head.conv(x), self.regression_head.conv(x)
        raw = self.regression_head.bbox_reg(boxes).float() * self.level_scales[level].float()
        distances = raw.exp() / self.strides[level] if self.exponential else raw.relu()
        outputs = {
            "cls_logits": self.classification_head.cls_logits(classes),
            "bbox_regression": distances,
            "bbox_ctrness": self.regression_head.bbox_ctrness(classes if self.rates_classes else boxes),
        }
        return {name: value.flatten(2).transpose(1, 2) for name, value in outputs.items()}
