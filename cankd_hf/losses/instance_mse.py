"""The control for CanKD: the same distance without the cross-attention block."""

from torch import Tensor

from cankd_hf.losses.base import FeatureLoss, compute_dtype
from cankd_hf.losses.kernels.blocks import on_whole_maps
from cankd_hf.losses.kernels.moments import instance_distance, pair_moments
from cankd_hf.losses.kernels.whole import whole_dtype, whole_instance_distance


class InstanceMSELoss(FeatureLoss):
    """Half the mean squared difference of two instance-normalised maps.

    `0.5 * mean (IN(s) - IN(t))^2`, which is 1 - r averaged over images and channels (r the spatial Pearson
    correlation, up to eps): PKD computed for each image. CanKD equals this loss at initialisation, where its output
    norm is 0; the difference between the two in a trained student is the effect of the block.

    Args:
        channels: channels C of both maps.

    Shape:
        student and teacher [B, C, H, W] -> [].

    Notes:
        Computed from moments, block by block. Differentiable once.

    Example:
        >>> import torch
        >>> loss, maps = InstanceMSELoss(4), torch.arange(64.0).reshape(1, 4, 4, 4)
        >>> round(loss(maps, 3 * maps + 1).item(), 4)
        0.0
    """

    raw_maps = True
    paper = "2207.02039"
    citation = (
        "@inproceedings{cao2022pkd, title={PKD: General Distillation Framework for Object Detectors via Pearson "
        "Correlation Coefficient}, author={Cao, Weihan and Zhang, Yifan and Gao, Jianfei and Cheng, Anda and Cheng, "
        "Ke and Cheng, Jian}, booktitle={NeurIPS}, year={2022}}"
    )

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked maps [B, C, H, W]."""
        if on_whole_maps(student.device):
            s, t = (x.to(whole_dtype(student)).contiguous() for x in (student, teacher))
            return whole_instance_distance(s, t, compute_dtype(student))
        m = pair_moments(student.flatten(2), teacher.flatten(2))
        return instance_distance(m.var_s, m.var_t, m.cov_st)
