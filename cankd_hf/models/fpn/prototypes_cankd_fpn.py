"""A light mask branch for one-stage detectors: prototypes and coefficients (YOLACT, Bolya et al. 2019, section 3).

A few convolutions make prototypes of the whole image from the finest map; every cell of every level predicts, beside
its box, a coefficient for each. The mask of a box is the sigmoid of the sum of the prototypes, weighted by its
coefficients, within the box. Here it is read on a grid of its own in each box (RoI align, as BlendMask does, Chen et
al. 2020), so that masks have one size, that of Mask R-CNN's, and small objects weigh as much as large ones.

This file travels with every saved detector (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B batch, C channels, A cells of all levels, P prototypes, S side of a mask, n boxes of an image.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from .modeling_cankd_fpn import make_norm

PROTOTYPES = 32
LAYERS = 3  # 3x3 convolutions before the maps are enlarged
SIDE = 28  # of a mask, in cells
WEIGHT = 6.125  # of the loss, as published
MOST = 100  # cells of an image that its loss reads, as published
SAMPLES = 2  # of RoI align, along a side of a cell


class PrototypeMasks(nn.Module):
    """The branch: maps of a neck and features of a tower in, logits of masks out.

    Args:
        channels: of the maps, and of the tower.
        stride: of the finest map, in pixels.
    """

    def __init__(self, channels: int, stride: float) -> None:
        super().__init__()
        self.scale = 2 / stride  # cells of the prototypes in a pixel
        norm = partial(make_norm, "group")
        blocks = [self._block(channels, norm) for _ in range(LAYERS)]
        self.before, self.after = nn.Sequential(*blocks), self._block(channels, norm)
        self.prototype = nn.Conv2d(channels, PROTOTYPES, 1)
        self.coefficient = nn.Conv2d(channels, PROTOTYPES, 3, padding=1)

    @staticmethod
    def _block(channels: int, norm: partial[nn.Module]) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU())

    def prototypes(self, finest: Tensor) -> Tensor:
        """The finest map `[B, C, h, w]` -> `[B, P, 2h, 2w]`, at least 0."""
        larger = F.interpolate(self.before(finest), scale_factor=2.0, mode="bilinear", align_corners=False)
        return F.relu(self.prototype(self.after(larger)))

    def coefficients(self, tower: Tensor) -> Tensor:
        """The features of one level `[B, C, h, w]` -> `[B, P, h, w]` in -1..1."""
        return self.coefficient(tower).tanh()

    def masks(self, prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
        """The masks of some boxes of one image: logits `[n, S, S]`.

        Args:
            prototypes: of the image, `[P, h, w]`.
            coefficients: of each box, `[n, P]`.
            boxes: corners `[n, 4]` in pixels.
        """
        return torch.einsum("np,npyx->nyx", coefficients, self._read(prototypes, boxes))

    def _read(self, prototypes: Tensor, boxes: Tensor) -> Tensor:
        return roi_align(prototypes[None], [boxes], SIDE, self.scale, SAMPLES, aligned=True)

    def loss(
        self, targets: Sequence[dict[str, Tensor]], prototypes: Tensor, coefficients: Tensor, matches: Sequence[Tensor]
    ) -> Tensor:
        """The published loss: binary cross-entropy over the area of each object's box, its mean over the cells.

        Args:
            targets: of each image `boxes` `[n, 4]` (corners in pixels) and `masks` `[n, H, W]` of the same pixels.
            prototypes: `[B, P, h, w]`.
            coefficients: `[B, A, P]`.
            matches: of each image the object of each cell, `[A]`, -1 for none.

        Returns:
            [], 0 without any object.
        """
        total, count = prototypes.sum() * 0 + coefficients.sum() * 0, 0
        for target, maps, vectors, matched in zip(targets, prototypes, coefficients, matches, strict=True):
            (cells,) = torch.where(matched >= 0)
            if not len(cells):
                continue
            cells = cells[:: -(-len(cells) // MOST)]  # evenly over the levels and the image
            objects, boxes = matched[cells], target["boxes"]
            logits = torch.einsum("np,npyx->nyx", vectors[cells], self._read(maps, boxes)[objects])
            own = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
            given = target["masks"][:, None].to(boxes.dtype)
            wanted = roi_align(given, torch.cat([own, boxes], 1), SIDE, 1.0, SAMPLES, aligned=True)
            each = F.binary_cross_entropy_with_logits(logits, wanted[objects, 0], reduction="none")
            total, count = total + each.mean(dim=(1, 2)).sum(), count + len(cells)
        return total * WEIGHT / max(count, 1)
