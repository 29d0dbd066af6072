"""Pearson correlation of each channel over the batch (PKD)."""

from torch import Tensor

from cankd_hf.losses.base import FeatureLoss, compute_dtype
from cankd_hf.losses.instance_mse import InstanceMSELoss
from cankd_hf.losses.kernels.blocks import on_whole_maps
from cankd_hf.losses.kernels.moments import pair_moments

EPS = 1e-6  # added to a standard deviation, as in the authors' code


class PearsonLoss(FeatureLoss):
    """Half the mean squared difference of maps whose channels are standardised over the batch (PKD, Cao et al. 2022).

    `0.5 * mean (norm(s) - norm(t))^2` with `norm(x) = (x - mean) / (std + 1e-6)` over B, H and W of a channel, which
    is 1 - r. `instance_mse` is the same for each image by itself.

    Args:
        channels: channels C of both maps.

    Shape:
        student and teacher [B, C, H, W] -> [].

    Notes:
        Computed from moments, on a CPU block by block: no standardised map is stored. Differentiable once.
    """

    raw_maps = True
    paper, citation = InstanceMSELoss.paper, InstanceMSELoss.citation  # PKD, both

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        s, t = student.flatten(2), teacher.flatten(2)
        var_s, var_t, cov = _whole(s, t) if on_whole_maps(s.device) else _by_blocks(s, t)
        values = s.shape[0] * s.shape[2]
        unbiased = values / max(values - 1, 1)
        # the least number keeps the gradient of the root finite for a constant channel
        std_s, std_t = ((unbiased * var).clamp_min(1e-24).sqrt() + EPS for var in (var_s, var_t))
        return 0.5 * (var_s / std_s.square() + var_t / std_t.square() - 2 * cov / (std_s * std_t)).mean()


def _by_blocks(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances and covariance of each channel [C] over the batch: those within images plus those between them."""
    m = pair_moments(s, t)
    centred_s, centred_t = m.mean_s - m.mean_s.mean(0), m.mean_t - m.mean_t.mean(0)
    var_s, var_t = (m.var_s + centred_s.square()).mean(0), (m.var_t + centred_t.square()).mean(0)
    return var_s, var_t, (m.cov_st + centred_s * centred_t).mean(0)


def _whole(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in few operations on whole maps [B, C, N]."""
    dtype = compute_dtype(s)
    s, t = (x - x.mean((0, 2), keepdim=True) for x in (s.to(dtype), t.to(dtype)))
    return s.square().mean((0, 2)), t.square().mean((0, 2)), (s * t).mean((0, 2))
