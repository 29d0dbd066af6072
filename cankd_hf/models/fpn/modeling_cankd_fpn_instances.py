"""Pyramid students that find objects and outline them: backbone -> neck -> a detection head with a mask branch.

This file travels with every saved student (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, H and W of the images, K classes, N `max_detections`, n objects, m side of a mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from transformers import initialization as init

from .detection_heads_cankd_fpn import Boxes, FCOSDetector
from .masks_cankd_fpn import CascadeMaskRCNNDetector, MaskBranch, MaskRCNNDetector
from .modeling_cankd_fpn_detection import FPNForObjectDetection, FPNObjectDetectionOutput

MASKED_DETECTORS = {
    "faster_rcnn": MaskRCNNDetector,
    "cascade_rcnn": CascadeMaskRCNNDetector,
    "fcos": FCOSDetector,  # whose head has prototypes and coefficients
}


@dataclass
class FPNInstanceSegmentationOutput(FPNObjectDetectionOutput):
    """Output of `FPNForInstanceSegmentation`: that of `FPNForObjectDetection`, and masks.

    Args:
        pred_masks: `[B, N, m, m]` float32 in eval mode: logits of the masks of the detections, each within its box; 0
            after the last one.
    """

    pred_masks: Tensor | None = None


class FPNForInstanceSegmentation(FPNForObjectDetection):
    """Instance segmentation: backbone, neck and a detection head with masks (`masks: true` in `FPNConfig`): Mask
    R-CNN, Cascade Mask R-CNN, or FCOS with the light branch of YOLACT.

    Images, labels and detections are those of `FPNForObjectDetection`. Each label also has `masks`, bool `[n, H, W]`,
    at the size of `pixel_values`, and each detection a mask; `post_process_instance_segmentation` puts them into the
    pixels of the images.
    """

    detectors = MASKED_DETECTORS
    output_class = FPNInstanceSegmentationOutput
    with_masks: ClassVar[bool] = True

    @cached_property
    def mask_layers(self) -> set[nn.Module]:
        """The layers of the mask branches."""
        branches = [module for module in self.head.modules() if isinstance(module, MaskBranch)]
        return {layer for branch in branches for layer in branch.modules()}

    def _init_weights(self, module: nn.Module) -> None:
        """torchvision's rule for mask branches (He et al. 2015, by the outputs), with biases of 0."""
        if module in self.mask_layers and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def targets(
        self, labels: Sequence[dict[str, Tensor] | None], batch: int, size: tuple[int, int]
    ) -> list[Boxes | None]:
        """Those of `FPNForObjectDetection`, with masks in the frame of the heads.

        Raises:
            ValueError: for labels without a mask of each object.
        """
        targets = super().targets(labels, batch, size)
        for i, (target, label) in enumerate(zip(targets, labels, strict=True)):
            if target is None or label is None:
                continue
            masks = label.get("masks")
            if masks is None and not len(target["boxes"]):
                masks = target["boxes"].new_zeros(0, *size)
            if masks is None or masks.ndim != 3 or len(masks) != len(target["boxes"]):
                got = "none" if masks is None else f"the shape {list(masks.shape)}"
                raise ValueError(f"labels[{i}].masks: expected [{len(target['boxes'])}, H, W], got {got}")
            if tuple(masks.shape[-2:]) != size and len(masks):  # of a plain ViT, whose images are resized
                masks = F.interpolate(masks[None].float(), size=size, mode="nearest-exact")[0]
            target["masks"] = masks
        return targets

    def fill(self, output: Any, found: list[Boxes], size: tuple[int, int]) -> None:
        super().fill(output, found, size)
        missing = [self.config.max_detections - len(one["masks"]) for one in found]
        padded = [F.pad(one["masks"], (0, 0, 0, 0, 0, rows)) for one, rows in zip(found, missing, strict=True)]
        output.pred_masks = torch.stack(padded)

    def post_process_instance_segmentation(
        self,
        outputs: FPNInstanceSegmentationOutput,
        threshold: float = 0.0,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        pixel_mask: Tensor | None = None,
    ) -> list[Boxes]:
        """Detections of each image with their masks, best first.

        Args:
            outputs: of a forward in eval mode.
            threshold: detections of this score or less are dropped.
            target_sizes: height and width of each original image, in whose pixels boxes and masks are given.
            pixel_mask: the one given to `forward`, if any.

        Returns:
            For each image `scores` `[n]`, `labels` `[n]` from 0, `boxes` `[n, 4]` (corners) and `masks` bool
            `[n, height, width]`.

        Raises:
            ValueError: without `target_sizes`.
        """
        if target_sizes is None:
            raise ValueError("target_sizes: expected the height and width of each image, got None")
        assert outputs.logits is not None and outputs.pred_masks is not None  # eval mode
        found = self.post_process_object_detection(outputs, threshold, target_sizes, pixel_mask)
        kept = outputs.logits.sigmoid().amax(-1) > threshold
        for one, logits, chosen, size in zip(found, outputs.pred_masks, kept, target_sizes, strict=True):
            height, width = (int(side) for side in size)
            own = logits[chosen].sigmoid()[:, None]
            pasted = paste_masks_in_image(own, one["boxes"], (height, width)) if len(own) else own
            one["masks"] = pasted.reshape(-1, height, width) > 0.5
        return found


FPNForInstanceSegmentation.register_for_auto_class("AutoModelForInstanceSegmentation")
