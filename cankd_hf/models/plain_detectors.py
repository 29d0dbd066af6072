"""Our detectors with fixed shapes: torchvision's selection of detections, without its loops over images.

Candidates of all images and classes go through one suppression: the boxes of each pair of image and class are shifted
to an area of their own, so that boxes of two pairs never overlap. Letters: B batch, K classes, M candidates and N
detections of an image.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import nms, roi_align

from cankd_hf.models.fpn.cascade_cankd_fpn import CascadeRCNNDetector
from cankd_hf.models.fpn.detection_heads_cankd_fpn import Anchors, FasterRCNNDetector
from cankd_hf.models.fpn.masks_cankd_fpn import MaskBranch
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.models.fpn.prototypes_cankd_fpn import SAMPLES, SIDE

ABSENT = -1.0  # score of an excluded candidate
Size = tuple[int, int]  # height, width
Detections = tuple[Tensor, Tensor, Tensor]


def anchors_of(generator: Anchors, maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    """The anchors `[A, 4]` of each level, without tensors that depend on values known only at run time."""
    levels = []
    for level, (x, cell) in enumerate(zip(maps, generator.cell_anchors, strict=True)):
        rows, columns = x.shape[-2:]
        down, across = generator.steps(level, (rows, columns), size)
        y, x = torch.meshgrid(torch.arange(rows) * down, torch.arange(columns) * across, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4).float()
        levels.append((shifts + cell.float()).reshape(-1, 4))
    return levels


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Corners `[..., 4]` clamped to the image."""
    x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def best(scores: Tensor, count: int, absent: float = ABSENT) -> tuple[Tensor, Tensor]:
    """The `count` best of `[B, n]` and their indices, padded with the score `absent` and index 0 where n is
    smaller."""
    padded = F.pad(scores, (0, count), value=absent)
    values, places = padded.topk(count, dim=1)
    return values, torch.where(values == absent, torch.zeros_like(places), places)


def best_in_order(scores: Tensor, count: int, absent: float = ABSENT) -> tuple[Tensor, Tensor]:
    """As `best`, and of equal scores the first comes first, which `topk` alone leaves open: in float64, each score is
    lowered by less than float32 resolves."""
    padded = F.pad(scores, (0, count), value=absent)
    places = (padded.double() - torch.arange(padded.shape[1]) * 1e-14).topk(count, dim=1).indices
    values = padded.gather(1, places)
    return values, torch.where(values == absent, torch.zeros_like(places), places)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, overlap: float, count: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression within each group of each image, at once.

    Takes boxes `[B, M, 4]` (corners in pixels), scores `[B, M]` (`ABSENT` for excluded candidates), groups `[B, M]`
    int64 in 0..`count` - 1, and the overlap from which the weaker box is suppressed. Returns scores `[B, limit]`, best
    first, `ABSENT` after the last, and indices among the M.
    """
    side = math.ceil(math.sqrt(count))  # a square keeps coordinates small, and float32 exact enough
    images = torch.arange(boxes.shape[0]).unsqueeze(1)
    reach = boxes.max() + 1
    column, row = groups % side, torch.div(groups, side, rounding_mode="floor") + images * side
    moved = boxes + (torch.stack([column, row, column, row], dim=-1) * reach)
    flat = scores.flatten()
    (present,) = torch.where(flat > ABSENT)
    # Two boxes apart from all others, so that the selection is never empty.
    spare = moved.new_tensor([[-4, -4, -3, -3], [-2, -2, -1, -1]])
    places = torch.cat([present, torch.arange(2) + flat.shape[0]])
    kept = nms(
        torch.cat([moved.flatten(0, 1)[present], spare]), torch.cat([flat[present], flat.new_zeros(2)]), overlap
    )
    mask = F.pad(torch.zeros_like(flat), (0, 2)).scatter(0, places[kept], 1.0)[:-2].reshape(scores.shape)
    return best_in_order(torch.where(mask > 0, scores, ABSENT), limit)


def rows_of(values: Tensor, places: Tensor) -> Tensor:
    """`[B, n, ...]` and `[B, N]` places -> `[B, N, ...]`."""
    return values[torch.arange(values.shape[0]).unsqueeze(1), places]


def regions_of(boxes: Tensor) -> Tensor:
    """Boxes `[B, n, 4]` -> `[B n, 5]`, each after the number of its image."""
    batch, count = boxes.shape[:2]  # `len` would make it a constant for torch.export
    images = torch.arange(batch).repeat_interleave(count, output_size=batch * count).unsqueeze(1)
    return torch.cat([images.float(), boxes.flatten(0, 1)], dim=1)


class DetectorForm(nn.Module):
    """`pixel_values [B, 3, H, W]` -> `scores [B, N]`, `labels [B, N]` and `boxes [B, N, 4]` (corners in 0..1).

    Best first; after the last detection the score is 0, the label -1 and the box 0.
    """

    def __init__(self, model: FPNForObjectDetection) -> None:
        super().__init__()
        self.model = model

    def candidates(self, maps: list[Tensor], size: Size, covered: Size) -> Detections:
        """Boxes `[B, M, 4]` in pixels, scores `[B, M]` and labels `[B, M]`; the score of what is not above the
        threshold is `ABSENT`."""
        raise NotImplementedError

    def detect(self, pixel_values: Tensor) -> tuple[list[Tensor], Size, Tensor, Tensor, Tensor]:
        """The maps, the size of the pictures, and of the detections the scores, `ABSENT` after the last one, labels,
        and boxes `[B, N, 4]` in pixels."""
        config = self.model.config
        maps = self.model.pyramid(pixel_values)
        size, covered = self.model.map_frame((pixel_values.shape[-2], pixel_values.shape[-1]))
        boxes, scores, labels = self.candidates(maps, size, covered)
        kept, places = suppress(boxes, scores, labels, config.nms_threshold, config.num_labels, config.max_detections)
        return maps, size, kept, rows_of(labels, places), rows_of(boxes, places)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        _, size, kept, labels, boxes = self.detect(pixel_values)
        return self.finished(size, kept, labels, boxes)

    def finished(self, size: Size, kept: Tensor, labels: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        """What was detected, in the form of the outputs."""
        found = kept > ABSENT
        x, y = boxes[..., 0::2] / size[1], boxes[..., 1::2] / size[0]
        boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
        return kept.clamp(min=0), torch.where(found, labels, -1), boxes * found.unsqueeze(-1)


class DenseForm(DetectorForm):
    """RetinaNet, FCOS and RepPoints."""

    def candidates(self, maps: list[Tensor], size: Size, covered: Size) -> Detections:
        boxes, scores, labels, _ = self.rated(maps, size, covered)
        return boxes, scores, labels

    def rated(self, maps: list[Tensor], size: Size, covered: Size) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The best of each level, as in torchvision, and their mask coefficients `[B, M, P]`, if the head has any."""
        config = self.model.config
        head: Any = self.model.head
        decode = head.box_coder.decode if config.head == "fcos" else head.box_coder.decode_single
        per_level = self._anchors(maps, covered)
        boxes, scores, labels, vectors = [], [], [], []
        for level, (x, anchors) in enumerate(zip(maps, per_level, strict=True)):
            predicted = {name: value.float() for name, value in head.at_level(x, level).items()}
            rated, quality = predicted["cls_logits"].sigmoid(), predicted.get("bbox_ctrness")
            if quality is not None and not head.multiplies:
                rated = torch.sqrt(rated * quality.sigmoid())
            values, places = best(rated.flatten(1), config.topk_candidates)
            cells = torch.div(places, config.num_labels, rounding_mode="floor")
            values = torch.where(values > config.score_threshold, values, ABSENT)
            if quality is not None and head.multiplies:
                values = torch.where(values > ABSENT, values * rows_of(quality[..., 0].sigmoid(), cells), ABSENT)
            shifts = rows_of(predicted["bbox_regression"], cells)
            decoded = decode(shifts.flatten(0, 1), anchors[cells.flatten()])
            boxes.append(clip(decoded.unflatten(0, (-1, config.topk_candidates)), size))
            if config.conventions == "openmmlab":
                values = torch.where((boxes[-1][..., 2:] > boxes[-1][..., :2]).all(dim=-1), values, ABSENT)
            scores.append(values)
            labels.append(places % config.num_labels)
            if "mask_coefficients" in predicted:
                vectors.append(rows_of(predicted["mask_coefficients"], cells))
        made = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(labels, dim=1)
        return (*made, torch.cat(vectors, dim=1) if vectors else None)

    def _anchors(self, maps: list[Tensor], covered: tuple[int, int]) -> list[Tensor]:
        generator: Any = self.model.head.anchor_generator
        if isinstance(generator, Anchors):
            return anchors_of(generator, maps, covered)
        images = ImageList(maps[0].new_empty(0, 3, *covered), [covered])
        cells = [x.shape[-2] * x.shape[-1] for x in maps]
        return list(generator(images, maps)[0].split(cells))


class PrototypeForm(DenseForm):
    """FCOS with the masks `[B, N, 28, 28]` of its detections, as logits, 0 after the last one."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        config, maps = self.model.config, self.model.pyramid(pixel_values)
        size, covered = self.model.map_frame((pixel_values.shape[-2], pixel_values.shape[-1]))
        boxes, scores, labels, vectors = self.rated(maps, size, covered)
        kept, places = suppress(boxes, scores, labels, config.nms_threshold, config.num_labels, config.max_detections)
        boxes, masks = rows_of(boxes, places), self.model.head.head.masks
        assert vectors is not None
        read = roi_align(
            masks.prototypes(maps[0]).float(), regions_of(boxes), SIDE, masks.scale, SAMPLES, aligned=True
        )
        logits = torch.einsum("np,npyx->nyx", rows_of(vectors, places).flatten(0, 1), read)
        logits = logits.unflatten(0, (-1, config.max_detections)) * (kept > ABSENT).unsqueeze(-1).unsqueeze(-1)
        return *self.finished(size, kept, rows_of(labels, places), boxes), logits


class FasterRCNNForm(DetectorForm):
    """Faster R-CNN with a fixed number of proposals an image, padded with empty boxes."""

    def candidates(self, maps: list[Tensor], size: Size, covered: Size) -> Detections:
        """Every class of every proposal."""
        head = self.model.head
        assert isinstance(head, FasterRCNNDetector)
        proposals, present = self._propose(head, maps, size, covered)
        batch = proposals.shape[0]  # `len` would make it a constant for torch.export
        rated, boxes = self._rate(head, maps, proposals, size)
        big = (boxes[..., 2:] - boxes[..., :2] >= 1e-2).all(dim=-1) & present.flatten().unsqueeze(1)
        rated = torch.where(big & (rated > self.model.config.score_threshold), rated, ABSENT)
        labels = torch.arange(self.model.config.num_labels).expand_as(rated)
        return (boxes.reshape(batch, -1, 4), rated.reshape(batch, -1), labels.reshape(batch, -1))

    def _rate(
        self, head: FasterRCNNDetector, maps: list[Tensor], proposals: Tensor, size: Size
    ) -> tuple[Tensor, Tensor]:
        """Probabilities `[B n, K]` and boxes `[B n, K, 4]` of the classes of all proposals `[B, n, 4]`."""
        roi = head.roi_heads
        logits, shifts = self._classify(roi, maps, proposals)
        boxes = roi.box_coder.decode_single(shifts, proposals.flatten(0, 1)).unflatten(1, (-1, 4))[:, 1:]
        return logits.softmax(-1)[:, 1:], clip(boxes, size)

    def _classify(self, roi: RoIHeads, maps: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and box regression of boxes `[B, n, 4]`."""
        pooled = self._pool(roi.box_roi_pool, maps, regions_of(boxes))
        logits, shifts = roi.box_predictor(roi.box_head(pooled.to(maps[0].dtype)))
        return logits.float(), shifts.float()

    def _propose(
        self, head: FasterRCNNDetector, maps: list[Tensor], size: Size, covered: Size
    ) -> tuple[Tensor, Tensor]:
        """Proposals `[B, n, 4]` in pixels and whether each exists `[B, n]`."""
        rpn = head.rpn
        boxes, scores, levels = [], [], []
        for level, (x, anchors) in enumerate(zip(maps, anchors_of(rpn.anchor_generator, maps, covered), strict=True)):
            (objectness,), (deltas,) = rpn.head([x])
            objectness = objectness.float().permute(0, 2, 3, 1).flatten(1)
            deltas = deltas.float().permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4))
            count = rpn.pre_nms_top_n()
            # Ordered by logits, as in torchvision: the probabilities of a trained head are often 1, all alike.
            values, places = best_in_order(objectness, count, -math.inf)
            values = torch.where(values > -math.inf, values.sigmoid(), ABSENT)
            decoded = rpn.box_coder.decode_single(rows_of(deltas, places).flatten(0, 1), anchors[places.flatten()])
            decoded = clip(decoded.reshape(-1, count, 4), size)
            big = (decoded[..., 2:] - decoded[..., :2] >= rpn.min_size).all(dim=-1)
            boxes.append(decoded)
            scores.append(torch.where(big, values, ABSENT))
            levels.append(torch.full_like(places, level))
        together = torch.cat(boxes, dim=1)
        rated, groups = torch.cat(scores, dim=1), torch.cat(levels, dim=1)
        kept, places = suppress(together, rated, groups, rpn.nms_thresh, len(maps), rpn.post_nms_top_n())
        return rows_of(together, places), kept > ABSENT

    def _pool(self, pool: Any, maps: list[Tensor], regions: Tensor) -> Tensor:
        """Features `[n, C, s, s]` of each region `[n, 5]`, from the level that matches its size."""
        strides = [stride for _, stride in self.model.levels][: len(pool.featmap_names)]
        area = (regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])
        finest, coarsest = math.log2(strides[0]), math.log2(strides[-1])
        aligned = getattr(pool, "aligned", False)
        relative = area.sqrt() / pool.canonical_scale
        relative = torch.log2(relative + 1e-6) if aligned else torch.log2(relative) + 1e-6
        wanted = torch.floor(pool.canonical_level + relative)
        levels = wanted.clamp(finest, coarsest) - finest
        result: Tensor | float = 0.0
        for level, (x, stride) in enumerate(zip(maps, strides, strict=False)):
            read = roi_align(x.float(), regions, pool.output_size, 1 / stride, pool.sampling_ratio, aligned)
            result = result + read * (levels == level).float().reshape(-1, 1, 1, 1)
        assert isinstance(result, Tensor)
        return result


class CascadeRCNNForm(FasterRCNNForm):
    """Cascade R-CNN with a fixed number of proposals an image: three stages, the mean of their scores, the last's
    boxes."""

    def _rate(
        self, head: FasterRCNNDetector, maps: list[Tensor], proposals: Tensor, size: Size
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(head, CascadeRCNNDetector)
        boxes, rated = proposals, []
        for stage in head.in_order():
            logits, shifts = self._classify(stage, maps, boxes)
            rated.append(logits)
            decoded = stage.box_coder.decode_single(shifts, boxes.flatten(0, 1))
            boxes = clip(decoded, size).reshape(proposals.shape)
        mean = head.mean_logits(rated).softmax(-1)[:, 1:]
        return mean, boxes.flatten(0, 1)[:, None].expand(-1, mean.shape[1], -1)


class MaskForm(nn.Module):
    """A two-stage form with the masks `[B, N, 28, 28]` of its detections, as logits, 0 after the last one."""

    def __init__(self, form: DetectorForm) -> None:
        super().__init__()
        self.form = form

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        maps, size, kept, labels, boxes = self.form.detect(pixel_values)
        scores, classes, shares = self.form.finished(size, kept, labels, boxes)
        regions = regions_of(boxes)
        branches = [part for part in self.form.model.head.modules() if isinstance(part, MaskBranch)]
        masks = [self._masks(branch, maps, regions, labels.flatten()) for branch in branches]
        logits = masks[0]
        if len(masks) > 1:
            logits = torch.logit(torch.stack([one.sigmoid() for one in masks]).mean(0), eps=1e-7)
        found = (kept > ABSENT).unsqueeze(-1).unsqueeze(-1)
        return scores, classes, shares, logits.unflatten(0, (-1, boxes.shape[1])) * found

    def _masks(self, branch: MaskBranch, maps: list[Tensor], regions: Tensor, labels: Tensor) -> Tensor:
        """The masks `[n, 28, 28]` of regions `[n, 5]`, each for its own class."""
        assert isinstance(self.form, FasterRCNNForm)
        pooled = self.form._pool(branch.pool, maps, regions)
        logits = branch.predictor(branch.head(pooled.to(maps[0].dtype))).float()
        return logits[torch.arange(logits.shape[0]), labels]


FORMS: dict[str, type[DetectorForm]] = {"faster_rcnn": FasterRCNNForm, "cascade_rcnn": CascadeRCNNForm}


def mask_form(model: FPNForObjectDetection) -> nn.Module:
    """The form of a detector with masks."""
    made = FORMS.get(model.config.head)
    return PrototypeForm(model) if made is None else MaskForm(made(model))
