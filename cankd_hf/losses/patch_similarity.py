"""How similar every cell of a map is to every other one, as distributions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.losses.base import FeatureLoss, above_zero
from cankd_hf.losses.kernels.divergence import mean_divergence


class PatchSimilarityLoss(FeatureLoss):
    """KL divergence of the cells' similarities within an image (the local loss of lightly-train's distillation v3).

    `mean over images and cells i of KL(softmax_j(<t_i, t_j> / T) || softmax_j(<s_i, s_j> / T))`, of unit vectors. The
    relations between cells are compared, not the cells: no connector has to fit, although there is one. Relational
    losses of this kind go back to SPKD (Tung & Mori 2019).

    Args:
        channels: channels C of both maps.
        temperature: T.
        cells: maps with more cells than this are averaged over areas to at most this many: the similarities of a map
            are a matrix of cells by cells, which memory and time are bounded by.

    Shape:
        student and teacher [B, C, H, W] -> [].
    """

    paper = "1907.09682"
    citation = (
        "@inproceedings{tung2019spkd, title={Similarity-Preserving Knowledge Distillation}, author={Tung, Frederick "
        "and Mori, Greg}, booktitle={ICCV}, year={2019}}\n@misc{lightlytrain2026, title={LightlyTrain: distillation "
        "v3}, author={{Lightly}}, year={2026}, howpublished={https://github.com/lightly-ai/lightly-train}}"
    )

    def __init__(self, channels: int, temperature: float = 0.07, cells: int = 1024) -> None:
        super().__init__(channels)
        above_zero("PatchSimilarityLoss", temperature=temperature)
        if cells < 2:
            raise InputError(f"PatchSimilarityLoss.cells: expected at least 2, got {cells}; 1024 is the default")
        self.temperature, self.cells = temperature, cells

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        ours, theirs = (self._similarities(x) for x in (student, teacher))
        return mean_divergence(ours, theirs, -1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of at most `cells` cells, in the proportions of the map's."""
        if height * width <= self.cells:
            return height, width
        rows = min(max(1, round((self.cells * height / width) ** 0.5)), height, self.cells)
        return rows, min(max(1, self.cells // rows), width)

    def _similarities(self, x: Tensor) -> Tensor:
        """The logits of the distributions of all cells, [B, cells, cells]."""
        size = self.grid(x.shape[2], x.shape[3])
        x = x if size == x.shape[2:] else F.adaptive_avg_pool2d(x, size)
        # the least length is that of vectors of half-precision noise: gradients stay within fp16's range
        unit = F.normalize(x.flatten(2), dim=1, eps=1e-6)
        alpha = 1 / self.temperature
        return torch.baddbmm(unit.new_empty(()), unit.mT, unit, beta=0, alpha=alpha)
