"""Masks of detections: the branch of Mask R-CNN (He et al. 2017, arXiv:1703.06870), from torchvision's parts.

It stands on Faster R-CNN, or on each stage of a cascade: Cascade Mask R-CNN (Cai & Vasconcelos 2019, 1906.09756).

A branch reads a region's features (14 x 14), and predicts a mask (28 x 28) for each class, of which that of the
region's own class counts. In a cascade the branch of a stage is trained on that stage's samples, with its weight; at
inference all three read the final boxes, and the mask is the mean of their probabilities.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: C channels, K classes, n boxes, m side of a mask.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from .cascade_cankd_fpn import STAGES, CascadeRCNNDetector
from .configuration_cankd_fpn import FPNConfig
from .conventions_cankd_fpn import AlignedRoIAlign
from .detection_heads_cankd_fpn import Boxes, FasterRCNNDetector, Losses, Maps, Samples

POOLED = 14  # cells of a region's features; masks have twice as many
LAYERS = 4  # 3x3 convolutions of a branch


class MaskBranch(nn.Module):
    """Masks `[n, K, 28, 28]` of boxes, as logits."""

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        super().__init__()
        channels, levels = config.fpn_channels, [str(i) for i in range(len(strides) - 1)]
        self.exact = config.conventions == "openmmlab"
        self.pool = (
            AlignedRoIAlign(strides[:-1], output_size=POOLED)
            if self.exact
            else MultiScaleRoIAlign(levels, output_size=POOLED, sampling_ratio=2)
        )
        self.head = MaskRCNNHeads(channels, [channels] * LAYERS, 1)
        self.predictor = MaskRCNNPredictor(channels, channels, config.num_labels)

    def forward(self, maps: Maps, images: ImageList, boxes: list[Tensor]) -> Tensor:
        """Boxes `[n, 4]` of each image, corners in its pixels -> masks of all."""
        levels = {str(i): x.float() for i, x in enumerate(maps)}
        pooled = self.pool(levels, boxes, [tuple(images.tensors.shape[-2:])])
        masks: Tensor = self.predictor(self.head(pooled.to(maps[0].dtype)))
        return masks.float()

    def loss(self, maps: Maps, images: ImageList, samples: Samples, targets: list[Boxes]) -> Tensor:
        """Mean binary cross-entropy of the masks of the samples that show objects, each for its class alone."""
        boxes, wanted, classes = [], [], []
        for sampled, matched, labels, target in zip(*samples, targets, strict=True):
            (rows,) = torch.where(labels > 0)
            boxes.append(sampled[rows])
            wanted.append(cropped(target["masks"], sampled[rows], matched[rows], 2 * POOLED, self.exact))
            classes.append(labels[rows] - 1)
        logits, kinds = self(maps, images, boxes), torch.cat(classes)
        if not len(kinds):
            return logits.sum() * 0
        own = logits[torch.arange(len(kinds), device=kinds.device), kinds]
        with torch.autocast(own.device.type, enabled=False):
            return F.binary_cross_entropy_with_logits(own, torch.cat(wanted))


def cropped(masks: Tensor, boxes: Tensor, matched: Tensor, side: int, exact: bool) -> Tensor:
    """What boxes `[n, 4]` show of the masks `[k, H, W]` that they match `[n]`: `[n, m, m]`, 0 to 1.

    By OpenMMLab's conventions (`exact`) samples are shifted by half a pixel, and what is shown is 0 or 1.
    """
    if not len(boxes):
        return boxes.new_zeros(0, side, side)
    regions = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    seen = roi_align(masks[:, None].to(boxes), regions, (side, side), 1.0, 0 if exact else -1, exact)[:, 0]
    return (seen >= 0.5).to(boxes) if exact else seen


def of_classes(masks: Tensor, found: list[Boxes]) -> list[Tensor]:
    """Masks `[n of all, K, m, m]` -> for each image those of the classes of its detections, `[n, m, m]`."""
    labels = torch.cat([one["labels"] for one in found])
    own = masks[torch.arange(len(labels), device=labels.device), labels]
    return list(own.split([len(one["labels"]) for one in found]))


class MaskRCNNDetector(FasterRCNNDetector):
    """Faster R-CNN with a mask branch: Mask R-CNN."""

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        super().__init__(config, strides)
        self.mask_branch = MaskBranch(config, strides)

    def further_losses(
        self, maps: Maps, images: ImageList, samples: Samples, targets: list[Boxes], stage: int = 0
    ) -> Losses:
        return {"loss_mask": self.mask_branch.loss(maps, images, samples, targets)}

    def _detect(self, maps: Maps, images: ImageList, proposals: list[Tensor]) -> list[Boxes]:
        found = super()._detect(maps, images, proposals)
        masks = self.mask_branch(maps, images, [one["boxes"] for one in found])
        return [{**one, "masks": own} for one, own in zip(found, of_classes(masks, found), strict=True)]


class CascadeMaskRCNNDetector(CascadeRCNNDetector):
    """Cascade R-CNN with a mask branch on each stage: Cascade Mask R-CNN."""

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        super().__init__(config, strides)
        self.mask_branches = nn.ModuleList(MaskBranch(config, strides) for _ in STAGES)

    def further_losses(
        self, maps: Maps, images: ImageList, samples: Samples, targets: list[Boxes], stage: int = 0
    ) -> Losses:
        branch = self.mask_branches[stage]
        assert isinstance(branch, MaskBranch)
        return {"loss_mask": branch.loss(maps, images, samples, targets)}

    def _detect(self, maps: Maps, images: ImageList, proposals: list[Tensor]) -> list[Boxes]:
        found = super()._detect(maps, images, proposals)
        boxes = [one["boxes"] for one in found]
        rated = torch.stack([branch(maps, images, boxes).sigmoid() for branch in self.mask_branches])
        masks = torch.logit(rated.mean(0), eps=1e-7)
        return [{**one, "masks": own} for one, own in zip(found, of_classes(masks, found), strict=True)]
