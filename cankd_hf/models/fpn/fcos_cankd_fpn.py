"""The heads of FCOS (Tian et al. 2019): torchvision's, and one with the conventions of MMDetection's weights.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, C channels, H and W of that map, A points.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

from .configuration_cankd_fpn import FPNConfig
from .conventions_cankd_fpn import select_rated
from .modeling_cankd_fpn import make_norm
from .prototypes_cankd_fpn import PrototypeMasks

PRIOR = 0.01  # probability of an object at an anchor, before training: the focal loss starts small


class FittedFCOSHead(FCOSHead):
    """torchvision's head, whose norms have fewer than 32 groups where the maps are narrow.

    With a branch of `masks` its outputs hold `mask_coefficients` `[B, A, P]` and the `prototypes` `[B, P, h, w]` too.
    """

    multiplies = False  # whether a score is probability times centre-ness, and not its root, see `select_rated`

    def __init__(self, channels: int, num_classes: int, layers: int, masks: PrototypeMasks | None = None) -> None:
        nn.Module.__init__(self)
        norm = partial(make_norm, "group")
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(channels, 1, num_classes, layers, PRIOR, norm)
        self.regression_head = FCOSRegressionHead(channels, 1, layers, norm)
        self.masks = masks

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """As `FCOSHead.forward`: maps `[B, C, H, W]` -> `[B, A, ...]`."""
        levels = [self.at_level(one, level) for level, one in enumerate(x)]
        outputs = {name: torch.cat([one[name] for one in levels], dim=1) for name in levels[0]}
        return outputs if self.masks is None else {**outputs, "prototypes": self.masks.prototypes(x[0])}

    def at_level(self, x: Tensor, level: int) -> dict[str, Tensor]:
        """The outputs of one level; distances in its strides."""
        classes, boxes = self.classification_head.conv(x), self.regression_head.conv(x)
        outputs = {
            "cls_logits": self.classification_head.cls_logits(classes),
            "bbox_regression": self.distances(self.regression_head.bbox_reg(boxes), level),
            "bbox_ctrness": self.regression_head.bbox_ctrness(self.rated(classes, boxes)),
        }
        if self.masks is not None:
            outputs["mask_coefficients"] = self.masks.coefficients(boxes)
        return {name: value.flatten(2).transpose(1, 2) for name, value in outputs.items()}

    def distances(self, raw: Tensor, level: int) -> Tensor:
        """The distances that are meant by the output of one level."""
        return raw.relu()

    def rated(self, classes: Tensor, boxes: Tensor) -> Tensor:
        """Which tower's features tell the centre-ness."""
        return boxes

    def select(
        self,
        outputs: dict[str, Any],
        anchors: Sequence[list[Tensor]],
        sizes: Sequence[tuple[int, int]],
        decode: Callable[[Tensor, Tensor], Tensor],
        limits: tuple[float, int, float, int],
    ) -> list[dict[str, Tensor]]:
        """The detections of each image, see `select_rated`, with logits of their `masks` `[n, S, S]` if it has any.

        `outputs` are a list with the values of each level by name, but for the `prototypes`.
        """
        prototypes, detections = outputs.pop("prototypes", None), []
        for i, size in enumerate(sizes):
            own = {name: [x[i] for x in levels] for name, levels in outputs.items()}
            found = select_rated(own, anchors[i], size, decode, limits, self.multiplies)
            cells = found.pop("cells")
            if self.masks is not None:
                vectors = torch.cat(own["mask_coefficients"])[cells]
                found["masks"] = self.masks.masks(prototypes[i], vectors, found["boxes"])
            detections.append(found)
        return detections

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """torchvision's losses, and that of the masks."""
        losses: dict[str, Tensor] = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        if self.masks is not None:
            prototypes, coefficients = head_outputs["prototypes"], head_outputs["mask_coefficients"]
            losses["mask"] = self.masks.loss(targets, prototypes, coefficients, matched_idxs)
        return losses


class ScaledFCOSHead(FittedFCOSHead):
    """The head of OpenMMLab's FCOS: distances have a learned factor for each level, and may be exponentials."""

    multiplies = True

    def __init__(self, config: FPNConfig, strides: Sequence[float], masks: PrototypeMasks | None = None) -> None:
        super().__init__(config.fpn_channels, config.num_labels, config.head_layers, masks)
        self.strides, self.exponential = list(strides), config.distances == "exponential"
        self.rates_classes = config.centerness_on == "classification"
        self.level_scales = nn.Parameter(torch.ones(len(strides)))

    def distances(self, raw: Tensor, level: int) -> Tensor:
        raw = raw.float() * self.level_scales[level].float()
        return raw.exp() / self.strides[level] if self.exponential else raw.relu()

    def rated(self, classes: Tensor, boxes: Tensor) -> Tensor:
        return classes if self.rates_classes else boxes
