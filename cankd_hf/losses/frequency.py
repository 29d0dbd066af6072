"""The coarse parts of two maps compared strictly, the fine parts loosely."""

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.base import FeatureLoss, above_zero, at_least_zero


class FrequencyLoss(FeatureLoss):
    """Squared difference of the low frequencies, of logarithms for the high ones (FD-CMKD, Liu et al. 2025; FreqKD).

    `mean (L(s) - L(t))^2 + high * mean (log(H(s)) - log(H(t)))^2`, with the low-pass L, `H(x) = x - L(x)` and
    `log(x) = sign(x) ln(1 + |x|)`. L keeps the Fourier coefficients up to `cutoff` of the highest frequency of either
    axis.

    Not taken over are the scale normalisation of FD-CMKD (see `conditioning`) and its shared classifier.

    Args:
        channels: channels C of both maps.
        cutoff: highest frequency of the low band, as a fraction of the highest of the grid, above 0; 1 has no high
            band but for rounding.
        high: weight of the high band.

    Shape:
        student and teacher [B, C, H, W] -> [].

    Notes:
        L is linear and separable, two products with small real matrices, without complex maps.
    """

    paper = "2511.19887"
    citation = (
        "@inproceedings{liu2026fdcmkd, title={Distilling Cross-Modal Knowledge via Feature Disentanglement}, "
        "author={Liu, Junhong and Zhang, Yuan and Huang, Tao and Xu, Wenchao and Yang, Renyu}, booktitle={AAAI}, "
        "year={2026}, note={arXiv:2511.19887}}"
    )

    def __init__(self, channels: int, cutoff: float = 0.25, high: float = 1.0) -> None:
        super().__init__(channels)
        above_zero("FrequencyLoss", cutoff=cutoff)
        at_least_zero("FrequencyLoss", high=high)
        self.cutoff, self.high = cutoff, high

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        rows, columns = (low_pass(size, self.cutoff, student) for size in student.shape[2:])
        low_s, low_t = (rows @ x @ columns for x in (student, teacher))
        value = F.mse_loss(low_s, low_t)
        if not self.high:
            return value
        return value + self.high * F.mse_loss(_signed_log(student - low_s), _signed_log(teacher - low_t))


def low_pass(size: int, cutoff: float, like: Tensor) -> Tensor:
    """The projection on the frequencies up to `cutoff * size / 2` of a periodic signal, symmetric [size, size]."""
    frequencies = torch.arange(1, size // 2 + 1, device=like.device, dtype=like.dtype)
    # every frequency stands for its negative too, but for 0 and the highest of an even size
    counted = (2 - (2 * frequencies == size).to(like.dtype)) * (2 * frequencies <= cutoff * size)
    places = torch.arange(size, device=like.device, dtype=like.dtype)
    between = (places[:, None] - places)[..., None] * frequencies * (2 * pi / size)
    return (1 + between.cos() @ counted) / size


def _signed_log(x: Tensor) -> Tensor:
    return x.sign() * x.abs().log1p()
