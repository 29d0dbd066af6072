"""The affinity of the paper's main results: a product divided by the number of keys, without a softmax."""

import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.affinities.base import Affinity, Block, Projections, joined_keys_and_values, keys_and_values
from cankd_hf.losses.kernels.blocks import on_whole_maps
from cankd_hf.losses.kernels.projection import covariance
from cankd_hf.losses.kernels.whole import whole_mix


class DotProduct(Affinity):
    """`f_ij = <q_i, k_j> / M`.

    Without a softmax the products re-associate: `y_i = (sum_j v_j k_j^T / M) q_i`, so that the whole block is one
    [C, C] channel mix of the student map for each image.
    """

    value_range = "signed"

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        return query.mT @ key / key.shape[2]

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        """`o = (w K theta) s + constant` with `K = value key^T / M`."""
        assert p.theta is not None
        if on_whole_maps(teacher.device):
            mix, bias = whole_mix(joined_keys_and_values(p, teacher, pool), *p.theta, *p.w)
            return Block(mix, bias, None)
        read = p.w.weight @ _value_times_key(p, teacher, pool)  # [B, C, D]
        return Block(read @ p.theta.weight, read @ p.theta.bias + p.w.bias, None)

    def flops(self, n: int, m: int, c: int, d: int) -> int:
        """Keys and values; the mix forward, its own gradient and the student's."""
        return 8 * n * c * d + 6 * n * c * c


def _value_times_key(p: Projections, teacher: Tensor, pool: bool) -> Tensor:
    """`value key^T / M`, [B, D, D]."""
    if pool or p.source is not None:
        key, value = keys_and_values(p, teacher, pool)
        return value @ key.mT / key.shape[2]
    # without the pool both are linear in the teacher map, so that its mean and covariance are all it takes
    assert p.phi is not None
    mean, cov = covariance(teacher, p.g.weight.dtype)
    mean_key, mean_value = F.linear(mean, *p.phi), F.linear(mean, *p.g)
    return p.g.weight @ cov @ p.phi.weight.T + mean_value[:, :, None] * mean_key[:, None, :]
