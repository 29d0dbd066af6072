"""Pyramid detectors: backbone -> neck -> a detection head of torchvision's, Cascade R-CNN, or RepPoints.

Boxes are those of the native detectors of `transformers`: centre x, centre y, width and height, divided by the width
and height of `pixel_values` (with its padding). Classes count from 0, in labels and in predictions, for every head.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, H and W of the images, K classes, N `max_detections`, n boxes of an image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import DeformConv2d, box_convert
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .cascade_cankd_fpn import CascadeRCNNDetector
from .configuration_cankd_fpn import FPNConfig, of_another
from .detection_heads_cankd_fpn import Boxes, FasterRCNNDetector, FCOSDetector, RepPointsDetector, RetinaNetDetector
from .fcos_cankd_fpn import PRIOR, ScaledFCOSHead
from .modeling_cankd_fpn import FPNPreTrainedModel, SimplePyramid, resize
from .reppoints_cankd_fpn import MomentTransform, RepPointsHead

DETECTORS: dict[str, type[RetinaNetDetector | FCOSDetector | FasterRCNNDetector | RepPointsDetector]] = {
    "retinanet": RetinaNetDetector,
    "fcos": FCOSDetector,
    "faster_rcnn": FasterRCNNDetector,
    "cascade_rcnn": CascadeRCNNDetector,
    "reppoints": RepPointsDetector,
}
MULTIPLE = 32  # of the images' size, as in torchvision, which reads the strides of the maps off their sizes
CANNOT_EXPORT = (
    "FPNForObjectDetection: forward cannot be exported, because the number of detections depends on the image; save "
    "the model and run `python -m cankd_hf.export FOLDER`, which writes onnx and torch.export files of it"
)
FOCAL = (RetinaNetClassificationHead, FCOSClassificationHead, RepPointsHead)
CONVOLUTIONAL = (*FOCAL, RetinaNetRegressionHead, FCOSRegressionHead, RPNHead)
ABSENT = -1e4  # logit of a class that was not detected: its sigmoid is 0, also in half precision


@dataclass
class FPNObjectDetectionOutput(ModelOutput):
    """Output of `FPNForObjectDetection`.

    Args:
        loss: [], float32, the sum of `loss_dict`; if labels are given.
        loss_dict: the losses of the head, named as in torchvision and weighted as in its paper; if labels are given.
        logits: `[B, N, K]` float32 in eval mode. Each row is a detection, best first: the sigmoid of its class is its
            score, that of every other class 0. Rows after the last detection are 0 in every class.
        pred_boxes: `[B, N, 4]` float32 in eval mode: their boxes, as in labels; 0 after the last one.
        hidden_states: the neck's maps, fine to coarse, if requested.
        attentions: the backbone's attention maps, if requested and it has any.
        dense: if requested, of the head of a dense detector: `class_logits` `[B, A, K]` of all A anchors, their
            `boxes` `[B, A, 4]` (corners in 0..1), the `centres` of the anchors `[A, 2]` (x and y in 0..1) and, if the
            head predicts it, `quality` `[B, A]`, the logit of the centre-ness.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    dense: dict[str, Tensor] | None = None


class FPNForObjectDetection(FPNPreTrainedModel):
    """Object detection: backbone, neck and one of five heads (see `FPNConfig`).

    Save it with `DeformableDetrImageProcessor` (keeps the aspect ratio, pads, gives `pixel_mask`) or
    `RTDetrImageProcessor` (one fixed size): their `post_process_object_detection` takes scores and classes from the
    sigmoid of `logits`, so `pipeline("object-detection", folder)` works.
    """

    detectors: ClassVar[Mapping[str, Callable[[FPNConfig, Sequence[float]], Any]]] = DETECTORS
    output_class: ClassVar[type[FPNObjectDetectionOutput]] = FPNObjectDetectionOutput
    with_masks: ClassVar[bool] = False

    def __init__(self, config: FPNConfig) -> None:
        super().__init__(config)
        if config.head not in DETECTORS:
            raise ValueError(of_another(type(self).__name__, config.head, self.detectors))
        if (masks := getattr(config, "masks", False)) != self.with_masks:
            other = "FPNForInstanceSegmentation" if masks else "FPNForObjectDetection"
            task = "instance-segmentation" if masks else "detection"
            heads = "" if masks else f" and head to one of {', '.join(self.detectors)}"
            fix = f"set masks to {str(self.with_masks).lower()}{heads}, or take {other} (task: {task})"
            raise ValueError(
                f"{type(self).__name__}: expected masks: {str(self.with_masks).lower()}, got a configuration of "
                f"{other}; {fix}"
            )
        # In the pixels of the heads every stride is a power of two: see `map_frame`.
        self.levels = [(channels, 2.0 ** round(math.log2(stride))) for channels, stride in self.levels]
        self.head = self.detectors[config.head](config, [stride for _, stride in self.levels])
        self.starts = starting_biases(self.head)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The published initialisation of the heads, with the functions of `transformers` that skip loaded weights."""
        if module in self.starts:
            init.normal_(module.get_parameter("weight"), std=0.01)
            if module.bias is not None:
                init.constant_(module.get_parameter("bias"), self.starts[module])
        elif isinstance(module, nn.Linear):  # PyTorch's own
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, MomentTransform):
            init.zeros_(module.log_factor)
        elif isinstance(module, ScaledFCOSHead):
            init.ones_(module.level_scales)
        else:
            super()._init_weights(module)

    def map_frame(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the images and of the area their maps cover, in the pixels of the heads.

        Images of a plain ViT are resized to multiples of 32, others are padded to them.
        """
        if isinstance(self.neck, SimplePyramid):
            height, width = (max(1, (n + MULTIPLE // 2) // MULTIPLE) * MULTIPLE for n in size)
            return (height, width), (height, width)
        return size, (size[0] + -size[0] % MULTIPLE, size[1] + -size[1] % MULTIPLE)

    def pyramid(self, pixel_values: Tensor, attentions: list[Tensor] | None = None) -> list[Tensor]:
        """Images `[B, 3, H, W]`, padded with 0 at the right and bottom -> the neck's maps, fine to coarse.

        For a plain ViT they are resized instead, so that its maps have strides of 4, 8, 16, ... (torchvision's heads
        need them) also with patch 14, and that a teacher's maps cover the image and no padding.
        """
        height, width = pixel_values.shape[-2:]
        _, covered = self.map_frame((height, width))
        if isinstance(self.neck, SimplePyramid):
            patch = self.neck.patch
            stride = 2 ** round(math.log2(patch))
            pixel_values = resize(pixel_values, [n // stride * patch for n in covered])
        else:
            pixel_values = F.pad(pixel_values, (0, covered[1] - width, 0, covered[0] - height))
        return super().pyramid(pixel_values, attentions)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[dict[str, Tensor] | None] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_dense: bool = False,
        **kwargs: Any,
    ) -> FPNObjectDetectionOutput | tuple[Any, ...]:
        """Losses in train and eval mode, detections only in eval mode (their selection takes time).

        Args:
            pixel_values: `[B, 3, H, W]`, of any size, normalised.
            pixel_mask: `[B, H, W]`, 1 on the image and 0 on padding at its right and bottom, where nothing is
                detected.
            labels: one dictionary an image: `class_labels` `[n]` int64 from 0, `boxes` `[n, 4]` (centre x, centre y,
                width, height) in 0..1 of W and H; n may be 0. None for an image without labels, which is left out of
                the loss.
            output_hidden_states: whether to return the neck's maps as `hidden_states`.
            output_attentions: whether to return the attention maps of a backbone that has them (with eager attention).
            output_dense: whether to return the predictions at all anchors, in the place of detections.
            kwargs: `return_dict`; others are ignored, for callers that pass the same arguments to every model.

        Returns:
            An `FPNObjectDetectionOutput`.

        Raises:
            ValueError: for labels that are not one dictionary (or None) an image, a class out of range or a box
                without area.
                Of labels on an accelerator, which would be waited for, the last two make the loss NaN.
            NotImplementedError: while it is exported or traced.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise NotImplementedError(CANNOT_EXPORT)
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        maps, extras = self.maps_and_extras(pixel_values, output_hidden_states, output_attentions)
        output = self.output_class()
        if labels is not None or not self.training or output_dense:
            extent, covered = self.map_frame(size)
            targets = None if labels is None else self.targets(labels, len(pixel_values), extent)
            sizes: list[tuple[float, float]] = [extent] * len(pixel_values)
            if pixel_mask is not None and self.head.reads_sizes:
                sizes = [(h * extent[0] / size[0], w * extent[1] / size[1]) for h, w in mask_sizes(pixel_mask)]
            # The heads read only the size of the first argument.
            images = ImageList(pixel_values.new_empty(0, 3, *covered), sizes)
            dense: Boxes | None = {} if output_dense else None
            losses, found = self.head(maps, images, targets, dense)
            if targets is not None:
                output.loss, output.loss_dict = torch.stack(list(losses.values())).sum(), losses
                if not output.loss.is_cpu and (known := [label for label in labels or () if label is not None]):
                    output.loss = output.loss.masked_fill(self.faulty(known), torch.nan)
            if dense:
                scale = torch.tensor([extent[1], extent[0]] * 2).to(dense["boxes"].device, non_blocking=True)
                output.dense = {**dense, "boxes": dense["boxes"] / scale, "centres": dense["centres"] / scale[:2]}
            elif not self.training:
                self.fill(output, found, extent)
        for name, value in extras.items():  # the last of a tuple
            output[name] = value
        return output

    def faulty(self, labels: Sequence[dict[str, Tensor]]) -> Tensor:
        """Whether labels hold a class out of range or a box without an area, bool []."""
        classes = torch.cat([label["class_labels"] for label in labels])
        sides = torch.cat([label["boxes"].reshape(-1, 4)[:, 2:] for label in labels])
        return ((classes < 0) | (classes >= self.config.num_labels)).any() | ~(sides > 0).all()

    def targets(
        self, labels: Sequence[dict[str, Tensor] | None], batch: int, size: tuple[int, int]
    ) -> list[Boxes | None]:
        """Labels of `transformers` -> those of torchvision, corners in pixels. Wrong ones on an accelerator, where a
        class out of range would end the process, are replaced."""
        if len(labels) != batch:
            raise ValueError(f"labels: expected one dictionary for each of {batch} images, got {len(labels)}")
        scale = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32).to(self.device, non_blocking=True)
        targets: list[Boxes | None] = []
        last = self.config.num_labels - 1
        for i, label in enumerate(labels):
            if label is None:
                targets.append(None)
                continue
            classes, boxes = label["class_labels"], label["boxes"].float().reshape(-1, 4)
            if not boxes.is_cpu:
                classes = classes.clamp(0, last)
                boxes = torch.cat([boxes[:, :2], boxes[:, 2:].clamp(min=torch.finfo(torch.float32).tiny)], 1)
            elif ((classes < 0) | (classes > last)).any():
                raise ValueError(f"labels[{i}]: expected classes 0 to {last}, got {classes.tolist()}")
            elif not (boxes[:, 2:] > 0).all():
                raise ValueError(f"labels[{i}]: expected boxes (cx, cy, w, h) with an area, got {boxes.tolist()}")
            corners = box_convert(boxes, "cxcywh", "xyxy") * scale.to(boxes.device)
            targets.append({"boxes": corners, "labels": classes.long()})
        return targets

    def fill(self, output: Any, found: list[Boxes], size: tuple[int, int]) -> None:
        """Adds the detections in images of this size to an output."""
        output.logits, output.pred_boxes = self.encode(found, size)

    def encode(self, found: list[Boxes], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Detections -> `logits` and `pred_boxes` with a fixed number of rows, to be stacked over batches and
        processes."""
        device = found[0]["boxes"].device
        logits = torch.full((len(found), self.config.max_detections, self.config.num_labels), ABSENT, device=device)
        boxes = torch.zeros(len(found), self.config.max_detections, 4, device=device)
        scale = torch.tensor([size[1], size[0]] * 2).to(device, non_blocking=True)
        for i, one in enumerate(found):
            count = len(one["scores"])
            rows = torch.arange(count, device=device)
            logits[i, rows, one["labels"]] = torch.logit(one["scores"], eps=1e-7)
            boxes[i, :count] = box_convert(one["boxes"] / scale, "xyxy", "cxcywh")
        return logits, boxes

    @staticmethod
    def post_process_object_detection(
        outputs: FPNObjectDetectionOutput,
        threshold: float = 0.0,
        target_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        pixel_mask: Tensor | None = None,
    ) -> list[Boxes]:
        """Detections of each image, best first, without the padding.

        Unlike the image processors' methods it is also right for padded batches: they scale boxes by the padded size.

        Args:
            outputs: of a forward in eval mode.
            threshold: detections of this score or less are dropped.
            target_sizes: height and width of each original image; None leaves boxes in 0..1.
            pixel_mask: the one given to `forward`, if any.

        Returns:
            For each image `scores` `[n]`, `labels` `[n]` from 0 and `boxes` `[n, 4]` (corners).
        """
        assert outputs.logits is not None and outputs.pred_boxes is not None  # eval mode
        scores, labels = outputs.logits.sigmoid().max(dim=-1)
        boxes = box_convert(outputs.pred_boxes, "cxcywh", "xyxy")
        scale = boxes.new_ones(len(boxes), 2)
        if target_sizes is not None:
            scale = torch.as_tensor(target_sizes, dtype=boxes.dtype, device=boxes.device)
        if pixel_mask is not None:
            sizes = torch.tensor(mask_sizes(pixel_mask), dtype=boxes.dtype, device=boxes.device)
            scale = scale * sizes.new_tensor(pixel_mask.shape[-2:]) / sizes
        boxes = boxes * scale.flip(1).repeat(1, 2)[:, None]
        return [
            {"scores": s[s > threshold], "labels": y[s > threshold], "boxes": b[s > threshold]}
            for s, y, b in zip(scores, labels, boxes, strict=True)
        ]


def starting_biases(head: nn.Module) -> dict[nn.Module, float]:
    """The initial bias of each convolution of a head; the standard deviation of all their weights is 0.01.

    They are keyed by layer because `transformers` never calls `_init_weights` on a module without parameters of its
    own.
    """
    biases: dict[nn.Module, float] = {}
    for part in head.modules():
        if isinstance(part, CONVOLUTIONAL):
            biases.update((layer, 0.0) for layer in part.modules() if isinstance(layer, (nn.Conv2d, DeformConv2d)))
        if isinstance(part, FOCAL):
            biases[part.cls_logits] = -math.log((1 - PRIOR) / PRIOR)
    return biases


def mask_sizes(pixel_mask: Tensor) -> list[tuple[int, int]]:
    """Height and width of each image without its padding, from a mask `[B, H, W]`."""
    seen = pixel_mask.bool()
    heights, widths = seen.any(dim=2).sum(dim=1), seen.any(dim=1).sum(dim=1)
    return [(height, width) for height, width in torch.stack([heights, widths], dim=1).tolist()]


FPNForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[FPNConfig.model_type] = "FPNForObjectDetection"  # for pipelines
