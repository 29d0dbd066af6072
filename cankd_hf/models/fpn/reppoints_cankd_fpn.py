"""The head of RepPoints (Yang et al. 2019, arXiv 1904.11490): an object is nine points, regressed and refined once.

Settings are those that its authors published in OpenMMLab's MMDetection (moment transform, group norm in the head).
Three things differ. Their neck has group norm too, ours has none. Their level after the backbone's last is made of the
backbone's map, ours of the neck's, as for FCOS. And an initial box that overlaps no object is never positive: by their
rule the best boxes of an object are positive however little they overlap it, so that every box that touches nothing
becomes positive while an object lies between the centres of the cells and no box reaches it.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, C channels, H and W of that map, K classes, A cells of all levels, P points, n objects of
an image. Points are (y, x), in cells from the centre of their own; boxes are two corners in pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.ops import DeformConv2d, box_convert, box_iou, deform_conv2d, sigmoid_focal_loss

from .modeling_cankd_fpn import conv_block

POINTS = 9  # as many as a 3x3 convolution reads
FEATURE_GRADIENT = 0.1  # share of the gradient that reaches the initial points through what is read at them
MOMENT_GRADIENT = 0.01  # of the gradient that reaches the scale of the moment transform
BETA = 0.11  # of the smooth L1 losses
INITIAL_WEIGHT, REFINED_WEIGHT = 0.5, 1.0


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by `factor`."""
    still = x.detach()
    return still + factor * (x - still)


def cell_centres(maps: list[Tensor], strides: list[float]) -> Tensor:
    """`[A, 3]`: x, y and stride of every cell in pixels, row by row; the first at 0, as for torchvision's anchors."""
    levels = []
    for x, stride in zip(maps, strides, strict=True):
        y, x = torch.meshgrid(*(torch.arange(n, device=x.device) * stride for n in x.shape[-2:]), indexing="ij")
        levels.append(torch.stack([x, y, torch.full_like(x, stride)], dim=-1).reshape(-1, 3))
    return torch.cat(levels).float()


class MomentTransform(nn.Module):
    """The box of a set of points: their mean, plus and minus their deviation times a learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.log_factor = nn.Parameter(torch.zeros(2))  # of x and y

    def forward(self, points: Tensor) -> Tensor:
        """`[..., P, 2]` -> corners `[..., 4]` in cells from the centre."""
        mean = points.mean(dim=-2, keepdim=True)
        # Not `std`, which warns where there are no sets at all.
        deviation = torch.linalg.vector_norm(points - mean, dim=-2) / (POINTS - 1) ** 0.5
        half = deviation.flip(-1) * scale_gradient(self.log_factor.float(), MOMENT_GRADIENT).exp()
        centre = mean.squeeze(-2).flip(-1)
        return torch.cat([centre - half, centre + half], dim=-1)

    def decode_single(self, points: Tensor, cells: Tensor) -> Tensor:
        """`[..., n, P, 2]` and their cells `[n, 3]` -> `[..., n, 4]` in pixels. The name is torchvision's."""
        return self(points) * cells[:, 2:] + cells[:, :2].repeat(1, 2)


class PointConv2d(DeformConv2d):
    """A 3x3 convolution that samples the map at nine given points instead of nine cells; always in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1, bias=False)

    def forward(self, input: Tensor, points: Tensor) -> Tensor:
        """Map `[B, C, H, W]`, points `[B, 2 P, H, W]` -> `[B, C, H, W]`."""
        points = points.nan_to_num()  # torchvision's operator would read outside the map's memory
        with torch.autocast(input.device.type, enabled=False):
            read = self.by_grid_sample if input.device.type == "cpu" else self.by_operator
            return read(input.float(), points).to(input.dtype)

    def by_operator(self, input: Tensor, points: Tensor) -> Tensor:
        """torchvision's deformable convolution, whose offsets are relative to the nine cells."""
        side = torch.arange(-1, 2, device=points.device)
        offsets = points - torch.cartesian_prod(side, side).reshape(1, -1, 1, 1)
        return deform_conv2d(input, offsets, self.weight.float(), padding=self.padding)

    def by_grid_sample(self, input: Tensor, points: Tensor) -> Tensor:
        """The same values with more memory, but fast on a CPU, where the operator is not vectorised."""
        height, width = input.shape[-2:]
        rows, columns = (torch.arange(n, device=points.device) for n in (height, width))
        y, x = points.unflatten(1, (POINTS, 2)).unbind(dim=2)
        # grid_sample counts from -1 at the map's left edge to 1 at its right one
        grid = torch.stack([(2 * (x + columns) + 1) / width - 1, (2 * (y + rows[:, None]) + 1) / height - 1], dim=-1)
        read = F.grid_sample(input, grid.flatten(1, 2), align_corners=False)
        # `len(input)` would make the batch a constant for torch.export
        read = read.reshape(input.shape[0], -1, height * width)
        return (self.weight.float().flatten(1) @ read).unflatten(-1, (height, width))


class RepPointsHead(nn.Module):
    """Predicts the points of every cell twice; the second time, and for the classes, from features sampled at the
    first."""

    def __init__(self, channels: int, num_classes: int, layers: int) -> None:
        super().__init__()
        self.class_tower = nn.Sequential(*[conv_block(channels, channels, 3, "group") for _ in range(layers)])
        self.point_tower = nn.Sequential(*[conv_block(channels, channels, 3, "group") for _ in range(layers)])
        self.initial_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.initial_points = nn.Conv2d(channels, 2 * POINTS, 1)
        self.class_conv = PointConv2d(channels)
        self.cls_logits = nn.Conv2d(channels, num_classes, 1)
        self.refined_conv = PointConv2d(channels)
        self.refined_points = nn.Conv2d(channels, 2 * POINTS, 1)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Maps `[B, C, H, W]` -> `cls_logits` `[B, A, K]`, `initial_points` and `bbox_regression` `[B, A, P, 2]`.

        The last are the refined points, under torchvision's name for the box regression.
        """
        levels = zip(*(self.forward_level(x) for x in maps), strict=True)
        logits, *points = (torch.cat([x.flatten(2).transpose(1, 2) for x in outputs], dim=1) for outputs in levels)
        initial, refined = (x.unflatten(-1, (POINTS, 2)) for x in points)
        return {"cls_logits": logits, "initial_points": initial, "bbox_regression": refined}

    def forward_level(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map -> class logits `[B, K, H, W]`, initial and refined points `[B, 2 P, H, W]` (float32)."""
        classes, places = self.class_tower(x), self.point_tower(x)
        initial = self.initial_points(F.relu(self.initial_conv(places))).float()
        read_at = scale_gradient(initial, FEATURE_GRADIENT)
        logits = self.cls_logits(F.relu(self.class_conv(classes, read_at)))
        shifts = self.refined_points(F.relu(self.refined_conv(places, read_at)))
        return logits, initial, initial.detach() + shifts.float()


class OverlapMatcher(Matcher):
    """torchvision's matcher of RetinaNet, also for images without objects; boxes without overlap are background."""

    def __init__(self) -> None:
        super().__init__(0.5, 0.4, allow_low_quality_matches=True)

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Overlaps `[n, A]` -> `[A]`: an object, -1 for background, -2 for neither."""
        if len(match_quality_matrix) == 0:
            return match_quality_matrix.new_full(match_quality_matrix.shape[1:], -1, dtype=torch.long)
        matches = super().__call__(match_quality_matrix)
        matches[match_quality_matrix.amax(dim=0) == 0] = self.BELOW_LOW_THRESHOLD
        return matches


def assign_centres(boxes: Tensor, cells: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Assigns each object's initial points to the nearest centre on the level of its size.

    The level of a box `[n, 4]` is the binary logarithm, rounded down, of its size (the root of its area) over `scale`;
    distances to the cells `[A, 3]` are relative to its width and height. Returns cells `[m]` and objects `[m]`: pairs,
    m <= n; a cell of several objects gets the nearest.
    """
    centres, sizes = box_convert(boxes, "xyxy", "cxcywh").split(2, dim=1)
    octaves = (sizes / scale).log2().mean(dim=1).trunc()
    gaps = (cells[:, 2].log2() - octaves[:, None]).abs()
    distances = ((cells[:, :2] - centres[:, None]) / sizes[:, None]).norm(dim=2)
    distances = distances.masked_fill(gaps > gaps.amin(dim=1, keepdim=True), torch.inf)
    nearest, chosen = distances.min(dim=1)
    order = nearest.argsort(stable=True)
    ranks = torch.arange(len(boxes), device=boxes.device)
    first = ranks.new_full((len(cells),), len(boxes)).scatter_reduce(0, chosen[order], ranks, "amin")
    objects = order[first[first < len(boxes)]]
    return chosen[objects], objects


def reppoints_losses(
    targets: list[dict[str, Tensor]], logits: Tensor, initial: Tensor, refined: Tensor, cells: Tensor, scale: float
) -> dict[str, Tensor]:
    """`loss_classification`, `loss_points_init` (times 0.5) and `loss_points_refine`.

    Each is a sum over the batch divided by the number of its positive cells (an image has at least one). Takes of each
    image `boxes` `[n, 4]` and `labels` `[n]`, class logits `[B, A, K]`, the boxes `[B, A, 4]` of the initial and of
    the refined points and the cells `[A, 3]`. Objects are matched to the initial boxes by overlap, for the classes and
    the refined points; boxes are compared in units of `scale` (`anchor_scale`) strides.
    """
    matcher, unit = OverlapMatcher(), scale * cells[:, 2:]
    sums: list[list[Tensor]] = [[], [], []]
    initial_count = refined_count = 0

    def distance(boxes: Tensor, wanted: Tensor, places: Tensor) -> Tensor:
        side = unit[places]
        return F.smooth_l1_loss(boxes[places] / side, wanted / side, reduction="sum", beta=BETA)

    for target, scores, first, second in zip(targets, logits, initial, refined, strict=True):
        boxes = target["boxes"]
        places, objects = assign_centres(boxes, cells, scale)
        initial_count += max(len(places), 1)
        matches = matcher(box_iou(boxes, first.detach()))
        (positive,) = torch.where(matches >= 0)
        refined_count += max(len(positive), 1)
        classes = torch.zeros_like(scores)
        classes[positive, target["labels"][matches[positive]]] = 1
        counted = matches != Matcher.BETWEEN_THRESHOLDS
        sums[0].append(sigmoid_focal_loss(scores[counted], classes[counted], reduction="sum"))
        sums[1].append(distance(first, boxes[objects], places))
        sums[2].append(distance(second, boxes[matches[positive]], positive))
    classification, points_init, points_refine = (torch.stack(values).sum() for values in sums)
    return {
        "loss_classification": classification / refined_count,
        "loss_points_init": INITIAL_WEIGHT * points_init / initial_count,
        "loss_points_refine": REFINED_WEIGHT * points_refine / refined_count,
    }
