"""Detection heads on the maps of a neck: torchvision's RetinaNet, FCOS and Faster R-CNN, and RepPoints.

Weights, losses and selection of detections of the first three are torchvision's own methods. Left out is what its
detectors do around them: the resize of `GeneralizedRCNNTransform`, losses in training only, and labels from 1.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, C channels, H and W of that map, K classes, A anchors of all levels, n boxes of an image.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign

from .configuration_cankd_fpn import TWO_STAGE_HEADS, FPNConfig
from .conventions_cankd_fpn import AlignedRoIAlign, Anchors, ExactAnchors, LimitedBoxCoder, with_area
from .fcos_cankd_fpn import FittedFCOSHead, ScaledFCOSHead
from .modeling_cankd_fpn import make_norm
from .prototypes_cankd_fpn import PrototypeMasks
from .reppoints_cankd_fpn import MomentTransform, RepPointsHead, cell_centres, reppoints_losses

RATIOS = (0.5, 1.0, 2.0)
SELECTS = ("score_thresh", "topk_candidates", "nms_thresh", "box_coder")  # what torchvision's selection reads
Maps = list[Tensor]  # `[B, C, H, W]` each, fine to coarse
Losses = dict[str, Tensor]
Boxes = dict[str, Tensor]  # "boxes" [n, 4] corners in pixels, "labels" [n] from 0, and "scores" [n] if predicted
# Of each image the boxes [n, 4] in the losses, the objects that they match [n] and their labels [n], 0: background.
Samples = tuple[list[Tensor], list[Tensor], list[Tensor]]
Targets = Sequence[Boxes | None]  # of each image; None for one that has no labels, which has no part in the losses


def rows_of(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a batch, without copying a list of numbers to the device, which would be waited for."""
    steps = {after - before for before, after in zip(rows, rows[1:], strict=False)}
    if len(steps) < 2:
        step = steps.pop() if steps else 1
        return x[rows[0] : rows[-1] + 1 : step]
    return torch.stack([x[row] for row in rows])


def labelled(targets: Sequence[Boxes | None] | None) -> list[int] | None:
    """The images with labels; None where all have them, or none are given."""
    if targets is None or all(target is not None for target in targets):
        return None
    return [row for row, target in enumerate(targets) if target is not None]


def some(maps: Maps, images: ImageList, targets: Targets, rows: list[int]) -> tuple[Maps, ImageList, Targets]:
    """The arguments of a head for some images of the batch."""
    sizes = [images.image_sizes[row] for row in rows]
    return [rows_of(x, rows) for x in maps], ImageList(images.tensors, sizes), [targets[row] for row in rows]


class Width(nn.Module):
    """In place of torchvision's backbone: provides only the width of the maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


def make_anchors(config: FPNConfig, strides: Sequence[float]) -> Anchors:
    """Anchors of each level in proportion to its stride, as in each of the three papers."""
    sides = [config.anchor_scale * stride for stride in strides]
    if config.conventions == "openmmlab":
        parts = 3 if config.head == "retinanet" else 1
        scales = [[side * 2 ** (i / parts) for i in range(parts)] for side in sides]
        ratios = (1.0,) if config.head == "fcos" else RATIOS
        return ExactAnchors(scales, (ratios,) * len(sides), strides, 0.5 if config.head == "fcos" else 0.0)
    if config.head == "retinanet":
        octaves = tuple(tuple(int(side * 2 ** (i / 3)) for i in range(3)) for side in sides)
        return Anchors(octaves, (RATIOS,) * len(sides))
    ratios = RATIOS if config.head in TWO_STAGE_HEADS else (1.0,)
    return Anchors(tuple((side,) for side in sides), (ratios,) * len(sides))


class DenseDetector(nn.Module):
    """Common base of RetinaNet, FCOS and RepPoints: every cell of every map predicts."""

    head: nn.Module
    anchor_generator: Callable[[ImageList, list[Tensor]], list[Tensor]]
    box_coder: Any
    # (targets, outputs, anchors of each image, number of anchors of each level) -> the head's losses
    compute_loss: Callable[[list[Boxes], Boxes, list[Tensor], list[int]], Losses]
    postprocess_detections: Callable[..., list[Boxes]]

    @property
    def reads_sizes(self) -> bool:
        """Whether `forward` reads the images' sizes, and not only their number."""
        return not self.training

    def forward(
        self, maps: Maps, images: ImageList, targets: Targets | None, dense: Boxes | None = None
    ) -> tuple[Losses, list[Boxes]]:
        """Losses of the images that have targets, detections in eval mode. `images` hold the padded size, as a
        tensor's shape, and each image's size without padding. With a dictionary `dense` the predictions at all anchors
        go there, in the place of detections: `class_logits` [B, A, K], `boxes` [B, A, 4] corners in pixels, `centres`
        [A, 2] of the anchors, and `quality` [B, A], the logit of the centre-ness, from a head that predicts it."""
        rows = labelled(targets)
        if rows is not None and self.training and dense is None:  # nobody reads what is predicted for the others
            maps, images, targets, rows = *some(maps, images, targets or [], rows), None
        predicted = self.head(maps)
        with torch.autocast(maps[0].device.type, enabled=False):
            outputs = {name: value.float() for name, value in predicted.items()}
            anchors = self.anchor_generator(images, maps)
            cells = [x.shape[-2] * x.shape[-1] for x in maps]
            counts = [n * (len(anchors[0]) // sum(cells)) for n in cells]
            losses = {} if targets is None else self.losses(targets, rows, outputs, anchors, counts)
            if dense is not None:
                dense |= self.predictions(outputs, anchors)
            if self.training or dense is not None:
                return losses, []
            by_level: dict[str, Any] = {
                name: value if name == "prototypes" else list(value.split(counts, dim=1))
                for name, value in outputs.items()
            }
            split = [list(a.split(counts)) for a in anchors]
            return losses, self.postprocess_detections(by_level, split, images.image_sizes)

    def at_level(self, x: Tensor, level: int) -> Boxes:
        """What the head says of one map: `[B, A, ...]`."""
        outputs: Boxes = self.head([x])
        return outputs

    def losses(
        self, targets: Targets, rows: list[int] | None, outputs: Boxes, anchors: list[Tensor], counts: list[int]
    ) -> Losses:
        """The head's losses, of the images `rows` if given."""
        if rows is not None:
            outputs = {name: rows_of(value, rows) for name, value in outputs.items()}
            anchors = [anchors[row] for row in rows]
        return self.compute_loss([target for target in targets if target is not None], outputs, anchors, counts)

    def predictions(self, outputs: Boxes, anchors: list[Tensor]) -> Boxes:
        """What the head says at every anchor; those of all images are the same, because they are of one size."""
        made = {"class_logits": outputs["cls_logits"], "boxes": self.decode(outputs["bbox_regression"], anchors[0])}
        made["centres"] = self.centres(anchors[0])
        if "bbox_ctrness" in outputs:
            made["quality"] = outputs["bbox_ctrness"][..., 0]
        return made

    def centres(self, anchors: Tensor) -> Tensor:
        """The centres [A, 2] of the anchors of one image, x and y in pixels."""
        return (anchors[:, :2] + anchors[:, 2:]) / 2

    def decode(self, regression: Tensor, anchors: Tensor) -> Tensor:
        """The boxes [B, A, 4] of a regression [B, A, ...] from the anchors of one image."""
        boxes: Tensor = self.box_coder.decode_single(regression, anchors)
        return boxes


def _selection(config: FPNConfig) -> dict[str, Any]:
    return {
        "score_thresh": config.score_threshold,
        "nms_thresh": config.nms_threshold,
        "topk_candidates": config.topk_candidates,
        "detections_per_img": config.max_detections,
    }


def select_boxes(head: Any, *arguments: Any) -> list[Boxes]:
    """torchvision's selection of RetinaNet for a head with its settings; where it `drops_empty` boxes, also that."""
    most = head.detections_per_img
    if not head.drops_empty:
        return RetinaNet.postprocess_detections(head, *arguments)
    everything = SimpleNamespace(**{name: getattr(head, name) for name in SELECTS}, detections_per_img=None)
    return [with_area(one, most) for one in RetinaNet.postprocess_detections(everything, *arguments)]


class RetinaNetDetector(DenseDetector, RetinaNet):
    """RetinaNet (Lin et al. 2017): 9 anchors a cell, focal loss."""

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        anchors = make_anchors(config, strides)
        norm = partial(make_norm, "group") if config.norm == "group" else None
        per_cell = anchors.num_anchors_per_location()[0]
        head = RetinaNetHead(config.fpn_channels, per_cell, config.num_labels, norm_layer=norm)
        for tower in (head.classification_head, head.regression_head):
            tower.conv = tower.conv[: config.head_layers]
        RetinaNet.__init__(
            self,
            Width(config.fpn_channels),
            config.num_labels,
            anchor_generator=anchors,
            head=head,
            **_selection(config),
        )
        del self.backbone, self.transform
        self.drops_empty = config.conventions == "openmmlab"
        if self.drops_empty:
            self.box_coder = LimitedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def postprocess_detections(self, *arguments: Any) -> list[Boxes]:
        """torchvision's selection; by OpenMMLab's conventions of boxes with an area alone."""
        return select_boxes(self, *arguments)

    def compute_loss(self, targets: list[Boxes], outputs: Boxes, anchors: list[Tensor], counts: list[int]) -> Losses:
        return RetinaNet.compute_loss(self, targets, outputs, anchors)

    def decode(self, regression: Tensor, anchors: Tensor) -> Tensor:
        # torchvision's coder takes the boxes of one image
        flat = self.box_coder.decode_single(regression.flatten(0, 1), anchors.repeat(len(regression), 1))
        return flat.view_as(regression)


class FCOSDetector(DenseDetector, FCOS):
    """FCOS (Tian et al. 2019): one point a cell, focal loss, generalised overlap, centre-ness."""

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        masks = PrototypeMasks(config.fpn_channels, strides[0]) if config.masks else None
        usual = partial(FittedFCOSHead, config.fpn_channels, config.num_labels, config.head_layers, masks)
        FCOS.__init__(
            self,
            Width(config.fpn_channels),
            config.num_labels,
            anchor_generator=make_anchors(config, strides),
            head=ScaledFCOSHead(config, strides, masks) if config.conventions == "openmmlab" else usual(),
            **_selection(config),
        )
        del self.backbone, self.transform

    @property
    def multiplies(self) -> bool:
        """Whether a score is probability times centre-ness, not its root, and the threshold is the probability's."""
        return isinstance(self.head, ScaledFCOSHead)

    def at_level(self, x: Tensor, level: int) -> Boxes:
        head: Any = self.head
        outputs: Boxes = head.at_level(x, level)
        return outputs

    def postprocess_detections(
        self, head_outputs: dict[str, Any], anchors: list[list[Tensor]], image_shapes: list[tuple[int, int]]
    ) -> list[Boxes]:
        """torchvision's selection, or that of a head with OpenMMLab's conventions or with masks."""
        head: Any = self.head
        if not self.multiplies and head.masks is None:
            return FCOS.postprocess_detections(self, head_outputs, anchors, image_shapes)
        limits = (self.score_thresh, self.topk_candidates, self.nms_thresh, self.detections_per_img)
        found: list[Boxes] = head.select(head_outputs, anchors, image_shapes, self.box_coder.decode, limits)
        return found

    def decode(self, regression: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self.box_coder.decode(regression, anchors)
        return boxes


class RepPointsDetector(DenseDetector):
    """RepPoints (Yang et al. 2019): nine points a cell, from which a box is made, refined once; focal loss."""

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        super().__init__()
        self.strides, self.scale = list(strides), config.anchor_scale
        self.drops_empty = config.conventions == "openmmlab"
        self.head = RepPointsHead(config.fpn_channels, config.num_labels, config.head_layers)
        self.box_coder = MomentTransform()
        for name, value in _selection(config).items():
            setattr(self, name, value)

    def postprocess_detections(self, *arguments: Any) -> list[Boxes]:
        """As RetinaNet's."""
        return select_boxes(self, *arguments)

    def anchor_generator(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """For each image the same: centre and stride of every cell, `[A, 3]`."""
        return [cell_centres(maps, self.strides)] * len(images.image_sizes)

    def centres(self, anchors: Tensor) -> Tensor:
        return anchors[:, :2]

    def compute_loss(self, targets: list[Boxes], outputs: Boxes, anchors: list[Tensor], counts: list[int]) -> Losses:
        cells = anchors[0]
        initial, refined = (
            self.box_coder.decode_single(outputs[name], cells) for name in ("initial_points", "bbox_regression")
        )
        return reppoints_losses(targets, outputs["cls_logits"], initial, refined, cells, self.scale)


class OrderedProposals(RegionProposalNetwork):
    """Of anchors with equal logits the first ones are proposed, which torchvision's `topk` leaves open: where no
    channel is active, all cells are equal."""

    def _get_top_n_idx(self, objectness: Tensor, num_anchors_per_level: list[int]) -> Tensor:
        first = [0, *accumulate(num_anchors_per_level)]
        levels = objectness.split(num_anchors_per_level, 1)
        order = [x.argsort(dim=1, descending=True, stable=True)[:, : self.pre_nms_top_n()] for x in levels]
        return torch.cat([places + start for places, start in zip(order, first, strict=False)], 1)


class FasterRCNNDetector(FasterRCNN):
    """Faster R-CNN (Ren et al. 2015) on a pyramid: proposals, then a classifier of the contents of each.

    Its losses use a random sample of anchors and proposals; in eval mode always the same one, without changing the
    random state of training.
    """

    reads_sizes = True

    def __init__(self, config: FPNConfig, strides: Sequence[float]) -> None:
        channels = config.fpn_channels
        anchors = make_anchors(config, strides)
        exact = config.conventions == "openmmlab"
        pool = MultiScaleRoIAlign([str(i) for i in range(len(strides) - 1)], output_size=7, sampling_ratio=2)
        super().__init__(
            Width(channels),
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0], config.head_layers),
            box_roi_pool=AlignedRoIAlign(strides[:-1], output_size=7) if exact else pool,
            box_head=TwoMLPHead(channels * 7 * 7, config.head_channels),
            box_predictor=FastRCNNPredictor(config.head_channels, config.num_labels + 1),
            box_score_thresh=config.score_threshold,
            box_nms_thresh=config.nms_threshold,
            box_detections_per_img=config.max_detections,
        )
        del self.backbone, self.transform
        self.rpn.__class__ = OrderedProposals
        if exact:
            for part in (self.rpn, self.roi_heads):
                part.box_coder = LimitedBoxCoder(part.box_coder.weights)

    def forward(
        self, maps: Maps, images: ImageList, targets: Targets | None, dense: Boxes | None = None
    ) -> tuple[Losses, list[Boxes]]:
        """As `DenseDetector.forward`; `dense` stays empty, because it has no prediction for every anchor."""
        if targets is not None and (rows := labelled(targets)) is not None:
            losses, found = self.forward(*some(maps, images, targets, rows))
            return losses, found if self.training else self.forward(maps, images, None)[1]
        known = None
        if targets is not None:  # 0 is the background here
            known = [{**t, "labels": t["labels"] + 1} for t in targets if t is not None]
        device = maps[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=not self.training):
            if not self.training:
                torch.manual_seed(0)
            proposals, losses = self._propose(maps, images, known)
            if known is not None:
                losses.update(self._box_losses(maps, images, proposals, known))
        if self.training:
            return losses, []
        return losses, self._detect(maps, images, proposals)

    def _detect(self, maps: Maps, images: ImageList, proposals: list[Tensor]) -> list[Boxes]:
        logits, regression = self._classify(self.roi_heads, maps, images, proposals)
        found = self.roi_heads.postprocess_detections(logits, regression, proposals, images.image_sizes)
        return [{"boxes": b, "scores": s, "labels": y - 1} for b, s, y in zip(*found, strict=True)]

    def _propose(self, maps: Maps, images: ImageList, targets: list[Boxes] | None) -> tuple[list[Tensor], Losses]:
        """torchvision's `RegionProposalNetwork.forward`, with losses in eval mode too."""
        rpn = self.rpn
        predicted, shifts = rpn.head(maps)
        counts = [x[0].numel() for x in predicted]
        with torch.autocast(maps[0].device.type, enabled=False):
            objectness, deltas = concat_box_prediction_layers(
                [x.float() for x in predicted], [x.float() for x in shifts]
            )
            anchors = rpn.anchor_generator(images, maps)
            proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
            kept, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, counts)
            if targets is None:
                return kept, {}
            labels, boxes = rpn.assign_targets_to_anchors(anchors, targets)
            wanted = rpn.box_coder.encode(boxes, anchors)
            objectness_loss, box_loss = rpn.compute_loss(objectness, deltas, labels, wanted)
        return kept, {"loss_objectness": objectness_loss, "loss_rpn_box_reg": box_loss}

    def _classify(
        self, roi: RoIHeads, maps: list[Tensor], images: ImageList, proposals: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Class logits `[n, K + 1]` and box deltas `[n, 4 (K + 1)]` of all proposals of the batch."""
        levels = {str(i): x.float() for i, x in enumerate(maps)}
        # The padded size: torchvision infers the strides from the largest unpadded image, wrongly for small ones.
        pooled = roi.box_roi_pool(levels, proposals, [tuple(images.tensors.shape[-2:])])
        logits, regression = roi.box_predictor(roi.box_head(pooled.to(maps[0].dtype)))
        return logits.float(), regression.float()

    def _box_losses(self, maps: Maps, images: ImageList, proposals: list[Tensor], targets: list[Boxes]) -> Losses:
        sampled, matched, labels, wanted = self.roi_heads.select_training_samples(proposals, targets)
        logits, regression = self._classify(self.roi_heads, maps, images, sampled)
        with torch.autocast(logits.device.type, enabled=False):
            class_loss, box_loss = fastrcnn_loss(logits, regression, labels, wanted)
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        return losses | self.further_losses(maps, images, (sampled, matched, labels), targets)

    def further_losses(
        self, maps: Maps, images: ImageList, samples: Samples, targets: list[Boxes], stage: int = 0
    ) -> Losses:
        """Losses of what a subclass predicts of the samples in the losses of a stage."""
        return {}
