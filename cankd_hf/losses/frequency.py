"""The coarse parts of two maps compared strictly, the fine parts loosely."""

from math import pi
from typing import Any

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
        L is a projection, done by products with small real matrices, without complex maps.
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
        height, width = student.shape[2:]
        rows, columns = (low_basis(size, self.cutoff, student) for size in (height, width))
        ours, theirs = (rows.mT @ x @ columns for x in (student, teacher))  # coefficients of the low frequencies
        value = (ours - theirs).square().sum() / student.numel()  # as of the maps: the bases are orthonormal
        if not self.high:
            return value
        high_s, high_t = student - rows @ ours @ columns.mT, teacher - rows @ theirs @ columns.mT
        return value + self.high * F.mse_loss(signed_log(high_s), signed_log(high_t))


def low_basis(size: int, cutoff: float, like: Tensor) -> Tensor:
    """An orthonormal basis [size, k] of the periodic signals of frequencies up to `cutoff * size / 2`."""
    highest = min(size // 2, int(cutoff * size / 2 + 1e-9))
    frequencies = torch.arange(1, highest + 1, device=like.device, dtype=like.dtype)
    places = torch.arange(size, device=like.device, dtype=like.dtype)[:, None]
    angles = places * frequencies * (2 * pi / size)
    alone = 2 * highest == size  # the highest frequency of an even size has no sine
    cosines, sines = angles.cos() * (2 / size) ** 0.5, angles.sin() * (2 / size) ** 0.5
    if alone:
        cosines, sines = torch.cat([cosines[:, :-1], cosines[:, -1:] / 2**0.5], 1), sines[:, :-1]
    return torch.cat([torch.full_like(places, size**-0.5), cosines, sines], 1)


def signed_log(x: Tensor) -> Tensor:
    """`sign(x) ln(1 + |x|)`."""
    result: Tensor = _SignedLog.apply(x)
    return result


class _SignedLog(torch.autograd.Function):
    """In few passes; `log1p` is several times slower than `log` on CPUs, and its accuracy near 0 is not needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().add_(1).log_().copysign_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope: Tensor = grad / (x.abs() + 1)
        return slope
