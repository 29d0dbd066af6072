"""The angle between the vectors of a cell, and a smooth L1 distance for their length (AM-RADIO)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.base import FeatureLoss, at_least_zero

EPS = 1e-4  # least product of two lengths: the gradient of a vector of 0 stays within the range of half precision


class CosineLoss(FeatureLoss):
    """Cosine distance of the C values of each cell, plus a smooth L1 distance (AM-RADIO, Ranzinger et al. 2024).

    `cosine * mean over cells of (1 - cos(s, t)) + smooth_l1 * mean smoothL1(s - t)`, with the authors' weights.
    `cosine: 1, smooth_l1: 0` compares directions only, as RT-DETRv4 does.

    Args:
        channels: channels C of both maps.
        cosine: weight of the cosine distance.
        smooth_l1: weight of the smooth L1 distance.

    Shape:
        student and teacher [B, C, H, W] -> [].
    """

    paper = "2312.06709"
    citation = (
        "@inproceedings{ranzinger2024radio, title={AM-RADIO: Agglomerative Vision Foundation Model -- Reduce All "
        "Domains Into One}, author={Ranzinger, Mike and Heinrich, Greg and Kautz, Jan and Molchanov, Pavlo}, "
        "booktitle={CVPR}, year={2024}}"
    )

    def __init__(self, channels: int, cosine: float = 0.9, smooth_l1: float = 0.1) -> None:
        super().__init__(channels)
        at_least_zero("CosineLoss", cosine=cosine, smooth_l1=smooth_l1)
        self.cosine, self.smooth_l1 = cosine, smooth_l1

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        s, t = student.flatten(2), teacher.flatten(2)
        lengths = torch.linalg.vector_norm(s, dim=1) * torch.linalg.vector_norm(t, dim=1)
        value = self.cosine * (1 - torch.linalg.vecdot(s, t, dim=1) / lengths.clamp_min(EPS)).mean()
        return torch.add(value, F.smooth_l1_loss(s, t), alpha=self.smooth_l1) if self.smooth_l1 else value
