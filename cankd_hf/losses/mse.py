"""The plain squared difference of two maps (FitNets)."""

import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.base import FeatureLoss


class MSELoss(FeatureLoss):
    """Mean squared difference of the maps: the hint loss of FitNets (Romero et al. 2015, equation 3).

    `mean (s - t)^2`; the paper's is half the sum instead of the mean. The scale of the teacher's channels decides what
    counts: see `conditioning` for targets of one scale.

    Args:
        channels: channels C of both maps.

    Shape:
        student and teacher [B, C, H, W] -> [].
    """

    paper = "1412.6550"
    citation = (
        "@inproceedings{romero2015fitnets, title={FitNets: Hints for Thin Deep Nets}, author={Romero, Adriana and "
        "Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and Bengio, Yoshua}, "
        "booktitle={ICLR}, year={2015}}"
    )

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        return F.mse_loss(student, teacher)
