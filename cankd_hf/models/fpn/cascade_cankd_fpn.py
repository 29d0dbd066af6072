"""Cascade R-CNN (Cai & Vasconcelos 2018, arXiv:1712.00726) on the maps of a neck, from torchvision's parts.

Three box heads in a row: each is trained on the boxes that the one before has refined, with a higher overlap for what
counts as an object. Thresholds, scales of the box regression and weights of the stages are those of the authors'
configurations: overlaps of 0.5, 0.6 and 0.7; smooth L1 with beta 1; class-agnostic regression.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: K classes, n boxes of the batch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image

from .configuration_cankd_fpn import FPNConfig
from .conventions_cankd_fpn import LimitedBoxCoder
from .detection_heads_cankd_fpn import Boxes, FasterRCNNDetector, Losses, Maps

# Of each stage: overlap of an object, scales of the box regression (inverse standard deviations), weight of its loss
STAGES = (
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)
# MMDetection's deviations of the last stage are 0.033 and 0.067, and no thirtieth and fifteenth.
OPENMMLAB_SCALES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067))
SAMPLED, POSITIVE = 512, 0.25  # boxes of an image in the losses of a stage, and the part of them that shows objects


class AgnosticPredictor(nn.Module):
    """Class logits `[n, K + 1]`, the first of which is the background, and one box regression `[n, 4]` for all
    classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, num_classes)
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)


class CascadeRCNNDetector(FasterRCNNDetector):
    """Cascade R-CNN: proposals as in Faster R-CNN, then three box heads in a row.

    At inference the boxes are those of the last stage, and the scores the mean of the three (each on its own boxes).
    MMDetection's are the softmax of the mean logits, as here by `conventions: openmmlab`.
    """

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        super().__init__(config, strides)
        pool = self.roi_heads.box_roi_pool
        self.stages = nn.ModuleList(
            RoIHeads(
                pool,
                TwoMLPHead(config.fpn_channels * 7 * 7, config.head_channels),
                AgnosticPredictor(config.head_channels, config.num_labels + 1),
                fg_iou_thresh=overlap,
                bg_iou_thresh=overlap,
                batch_size_per_image=SAMPLED,
                positive_fraction=POSITIVE,
                bbox_reg_weights=scales,
                score_thresh=config.score_threshold,
                nms_thresh=config.nms_threshold,
                detections_per_img=config.max_detections,
            )
            for overlap, scales, _ in STAGES
        )
        self.means_logits = config.conventions == "openmmlab"
        if self.means_logits:
            for stage, scales in zip(self.in_order(), OPENMMLAB_SCALES, strict=True):
                stage.box_coder = LimitedBoxCoder(scales)
        del self.roi_heads

    def in_order(self) -> list[RoIHeads]:
        """The stages, from the first to the last."""
        return [stage for stage in self.stages if isinstance(stage, RoIHeads)]

    def _box_losses(self, maps: Maps, images: ImageList, proposals: list[Tensor], targets: list[Boxes]) -> Losses:
        losses: Losses = {}
        for number, (stage, (_, _, weight)) in enumerate(zip(self.in_order(), STAGES, strict=True), 1):
            sampled, matched, labels, wanted = stage.select_training_samples(proposals, targets)
            logits, regression = self._classify(stage, maps, images, sampled)
            with torch.autocast(logits.device.type, enabled=False):
                class_loss, box_loss = cascade_losses(logits, regression, torch.cat(labels), torch.cat(wanted))
                losses[f"loss_classifier_{number}"] = weight * class_loss
                losses[f"loss_box_reg_{number}"] = weight * box_loss
                refined = self._refined(stage, regression.detach(), sampled, images)
            further = self.further_losses(maps, images, (sampled, matched, labels), targets, number - 1)
            losses |= {f"{name}_{number}": weight * loss for name, loss in further.items()}
            # True boxes were among the samples; refined, they would make the next stage's task too easy.
            proposals = [
                boxes[~_among(given, target["boxes"])]
                for boxes, given, target in zip(refined, sampled, targets, strict=True)
            ]
        return losses

    def _detect(self, maps: Maps, images: ImageList, proposals: list[Tensor]) -> list[Boxes]:
        rated: list[Tensor] = []
        boxes = proposals
        for stage in self.in_order():
            given = boxes
            logits, regression = self._classify(stage, maps, images, given)
            rated.append(logits)
            boxes = self._refined(stage, regression, given, images)
        last, mean = self.in_order()[-1], self.mean_logits(rated)
        # torchvision's selection takes the regression of every class
        found = last.postprocess_detections(mean, regression.repeat(1, mean.shape[1]), given, images.image_sizes)
        return [{"boxes": b, "scores": s, "labels": y - 1} for b, s, y in zip(*found, strict=True)]

    def mean_logits(self, stages: Sequence[Tensor]) -> Tensor:
        """Logits `[n, K + 1]` of the mean of the stages' probabilities; by OpenMMLab's conventions the mean logits."""
        if self.means_logits:
            return torch.stack(list(stages)).mean(0)
        return torch.stack([logits.softmax(-1) for logits in stages]).mean(0).clamp(min=1e-38).log()

    @staticmethod
    def _refined(stage: RoIHeads, regression: Tensor, boxes: list[Tensor], images: ImageList) -> list[Tensor]:
        """Boxes `[n, 4]` of each image after the regression `[n, 4]` of a stage, within the image."""
        decoded = stage.box_coder.decode(regression, boxes)[:, 0].split([len(one) for one in boxes])
        return [clip_boxes_to_image(one, size) for one, size in zip(decoded, images.image_sizes, strict=True)]


def cascade_losses(logits: Tensor, regression: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and smooth L1 (beta 1) of the boxes of objects, both divided by the number of samples.

    Args:
        logits: `[n, K + 1]`, the first of the background.
        regression: `[n, 4]`.
        labels: `[n]`, 0 for the background.
        wanted: `[n, 4]`, the regression to the true box.
    """
    if not len(labels):
        return logits.sum() * 0, regression.sum() * 0
    objects = labels > 0
    box_loss = F.smooth_l1_loss(regression[objects], wanted[objects], beta=1.0, reduction="sum") / len(labels)
    return F.cross_entropy(logits, labels), box_loss


def _among(boxes: Tensor, others: Tensor) -> Tensor:
    """Which of the boxes `[n, 4]` are equal to one of the others `[m, 4]`, bool `[n]`."""
    return (boxes[:, None] == others[None].to(boxes.dtype)).all(-1).any(-1)
