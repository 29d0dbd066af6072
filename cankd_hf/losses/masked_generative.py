"""The teacher's map generated from a masked map of the student (MGD)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.losses.base import FeatureLoss, above_zero, at_most_one, run_in_type


class MaskedGenerativeLoss(FeatureLoss):
    """Squared distance of the teacher's map and one generated from the masked student (MGD, Yang et al. 2022, sec. 3).

    `alpha * sum over C, H, W of (G(M * s) - t)^2`, averaged over B: M is 0 in a random part of the cells, drawn anew
    for each image and step, and G two 3x3 convolutions with a ReLU between them, trained with the student. In eval
    mode M is the same for all images and calls.

    The loss can fall by what the generator learns alone: compare the raw similarity in the log.

    Args:
        channels: channels C of both maps.
        mask: the part of the cells that is masked, above 0 and at most 1; the authors use 0.65 for one-stage
            detectors, 0.45 for two-stage ones and 0.75 for segmentation.
        alpha: the published factor of the sum; weight 1 then is the paper's.

    Shape:
        student and teacher [B, C, H, W] -> [].
    """

    paper = "2205.01529"
    citation = (
        "@inproceedings{yang2022mgd, title={Masked Generative Distillation}, author={Yang, Zhendong and Li, Zhe and "
        "Shao, Mingqi and Shi, Dachuan and Yuan, Zehuan and Yuan, Chun}, booktitle={ECCV}, year={2022}}"
    )

    def __init__(self, channels: int, mask: float = 0.65, alpha: float = 2e-5) -> None:
        super().__init__(channels)
        at_most_one("MaskedGenerativeLoss", mask=mask)
        above_zero("MaskedGenerativeLoss", alpha=alpha)
        self.mask, self.alpha = mask, alpha
        self.generator = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        masked = student * (self._draw(student) <= 1 - self.mask)
        return self.distance(run_in_type(self.generator, masked), teacher)

    def distance(self, generated: Tensor, teacher: Tensor) -> Tensor:
        """`alpha * sum (G - t)^2 / B` [] of two maps [B, C, H, W]."""
        return F.mse_loss(generated, teacher, reduction="sum") * (self.alpha / len(generated))

    def _draw(self, x: Tensor) -> Tensor:
        """Random numbers of each cell, [B, 1, H, W]; in eval mode always the same, [1, 1, H, W]."""
        if self.training:
            return torch.rand(len(x), 1, *x.shape[2:], device=x.device)
        drawn = torch.rand(1, 1, *x.shape[2:], generator=torch.Generator().manual_seed(0))
        return drawn.to(x.device, non_blocking=True)
