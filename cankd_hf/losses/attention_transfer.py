"""Where a map is large (AT)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.base import FeatureLoss


class AttentionTransferLoss(FeatureLoss):
    """Mean squared difference of two spatial attention maps (AT, Zagoruyko & Komodakis 2017, equation 2 with p = 2).

    `mean (Q(s) - Q(t))^2`, where Q is the mean over channels of the squares, flattened and divided by its L2 norm. The
    published weight is 1000.

    Args:
        channels: channels C of both maps.

    Shape:
        student and teacher [B, C, H, W] -> [].
    """

    paper = "1612.03928"
    citation = (
        "@inproceedings{zagoruyko2017at, title={Paying More Attention to Attention: Improving the Performance of "
        "Convolutional Neural Networks via Attention Transfer}, author={Zagoruyko, Sergey and Komodakis, Nikos}, "
        "booktitle={ICLR}, year={2017}}"
    )

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        # the sum over channels in the place of their mean: the norm divides it out
        squares = (torch.linalg.vector_norm(x, dim=1).square().flatten(1) for x in (student, teacher))
        ours, theirs = (F.normalize(x, dim=1) for x in squares)
        return F.mse_loss(ours, theirs)
