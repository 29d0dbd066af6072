"""Parts of the detection heads that weights of MMDetection need in place of torchvision's: `conventions: openmmlab`.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, C channels, A anchors, K classes, n boxes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, roi_align
from torchvision.ops._utils import convert_boxes_to_roi_format


class Anchors(AnchorGenerator):
    """torchvision's anchors, in float32 whatever the maps are, regenerated on every new device.

    `from_pretrained` builds models on the meta device, where torchvision's own tensors would stay.
    """

    cell_anchors: list[Tensor]

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        if self.cell_anchors[0].device != device:
            self.cell_anchors = [
                self.generate_anchors(sizes, ratios, torch.float32, device)
                for sizes, ratios in zip(self.sizes, self.aspect_ratios, strict=True)
            ]

    def steps(self, level: int, grid: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
        """Pixels between the anchors of a level: torchvision's are those of the map in the image, rounded down, which
        is less than the stride where the image is no multiple of it."""
        return size[0] // grid[0], size[1] // grid[1]


class ExactAnchors(Anchors):
    """Anchors whose sides are not rounded, at the levels' true strides.

    Args:
        sizes: sides of the square anchors of each level.
        ratios: height by width of the anchors of each level.
        strides: of the levels, whole numbers.
        offset: of the first anchor's centre from the corner of the image, in strides.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[Sequence[float]],
        strides: Sequence[float],
        offset: float,
    ) -> None:
        self.offsets = {tuple(side): offset * stride for side, stride in zip(sizes, strides, strict=True)}
        super().__init__(sizes, ratios)
        self.strides = [round(stride) for stride in strides]

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (torchvision's signature)
    ) -> Tensor:
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half_height, half_width = (x[:, None] * sides[None] / 2 for x in (heights, 1 / heights))
        corners = torch.stack([-half_width, -half_height, half_width, half_height], dim=-1).reshape(-1, 4)
        return corners + self.offsets[tuple(scales)]

    def steps(self, level: int, grid: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
        return self.strides[level], self.strides[level]

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        exact = [
            [torch.full_like(one, true) for one in pair] for pair, true in zip(strides, self.strides, strict=True)
        ]
        return super().grid_anchors(grid_sizes, exact)


class LimitedBoxCoder(BoxCoder):
    """torchvision's coder, which limits how much larger a box may become; here also how much smaller."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        codes = rel_codes.unflatten(-1, (-1, 4))
        _, _, wide, high = self.weights
        limit = self.bbox_xform_clip
        width, height = codes[..., 2:3].clamp(min=-limit * wide), codes[..., 3:].clamp(min=-limit * high)
        return super().decode_single(torch.cat([codes[..., :2], width, height], -1).flatten(-2), boxes)


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoI align whose samples are shifted by half a cell (Detectron2's `aligned`), as many as a bin has cells.

    Args:
        strides: of the levels that are read; a region's level is that of its size, 56 pixels for the finest one.
        output_size: of a region's map.
    """

    aligned = True

    def __init__(self, strides: Sequence[float], output_size: int) -> None:
        names = [str(i) for i in range(len(strides))]
        level = round(math.log2(strides[0]))
        super().__init__(names, output_size, 0, canonical_scale=56, canonical_level=level)
        self.strides = list(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps by name and boxes `[n, 4]` of each image -> `[n of all, C, height, width]`."""
        regions = convert_boxes_to_roi_format(boxes)
        sides = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).sqrt()
        levels = (sides / self.canonical_scale + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        first = x[self.featmap_names[0]]
        pooled = first.new_zeros(len(regions), first.shape[1], *self.output_size)
        for level, (name, stride) in enumerate(zip(self.featmap_names, self.strides, strict=True)):
            (rows,) = torch.where(levels == level)
            read = roi_align(x[name], regions[rows], self.output_size, 1 / stride, 0, aligned=True)
            pooled = pooled.index_put((rows,), read)
        return pooled


def select_rated(
    outputs: dict[str, list[Tensor]],
    anchors: list[Tensor],
    size: tuple[int, int],
    decode: Callable[[Tensor, Tensor], Tensor],
    limits: tuple[float, int, float, int],
    multiplies: bool = True,
) -> dict[str, Tensor]:
    """The detections of an image of FCOS, and of each its cell among those of all levels (`cells`).

    With `multiplies`, OpenMMLab's selection: the best classes of a level by their probability alone, which must exceed
    the threshold, then suppression by probability times centre-ness. Else torchvision's: all by the root of that.

    Args:
        outputs: `cls_logits` `[A, K]`, `bbox_regression` `[A, 4]` and `bbox_ctrness` `[A, 1]` of each level.
        anchors: `[A, 4]` of each level.
        size: height and width of the image.
        decode: regression and anchors -> boxes.
        limits: least probability, candidates of a level, overlap of the suppression, most detections.
        multiplies: whose selection.
    """
    threshold, candidates, overlap, most = limits
    boxes, scores, labels, places, first = [], [], [], [], 0
    levels = zip(*(outputs[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness")), anchors, strict=True)
    for logits, regression, centreness, own in levels:
        rated, quality = logits.sigmoid(), centreness.sigmoid()
        rated = (rated if multiplies else (rated * quality).sqrt()).flatten()
        (above,) = torch.where(rated > threshold)
        values, chosen = rated[above].topk(min(candidates, len(above)))
        chosen = above[chosen]
        cells = torch.div(chosen, logits.shape[1], rounding_mode="floor")
        boxes.append(clip_boxes_to_image(decode(regression[cells], own[cells]), size))
        scores.append(values * quality[cells, 0] if multiplies else values)
        labels.append(chosen % logits.shape[1])
        places.append(cells + first)
        first += len(own)
    found = {"boxes": torch.cat(boxes), "scores": torch.cat(scores), "labels": torch.cat(labels)}
    found["cells"] = torch.cat(places)
    kept = batched_nms(found["boxes"], found["scores"], found["labels"], overlap)
    found = {name: value[kept] for name, value in found.items()}
    return with_area(found, most) if multiplies else {name: value[:most] for name, value in found.items()}


def with_area(found: dict[str, Tensor], most: int) -> dict[str, Tensor]:
    """The first detections whose boxes have an area; the others, which OpenMMLab drops, have suppressed none."""
    (kept,) = torch.where((found["boxes"][:, 2:] > found["boxes"][:, :2]).all(dim=1))
    return {name: value[kept[:most]] for name, value in found.items()}
