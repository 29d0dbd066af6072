"""The affinity of the paper's main results: a product divided by the number of keys, without a softmax."""

import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.affinities.base import Affinity, Block, Norm, Projections, joined_keys_and_values, keys_and_values
from cankd_hf.losses.kernels.composition import composed_mix, narrow_mix
from cankd_hf.losses.kernels.projection import covariance
from cankd_hf.losses.kernels.whole_dot_product import fits_one_node, whole_dot_product


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
        if pool:
            keys_values = joined_keys_and_values(p, teacher, pool)
            if _few_keys(student.shape[2], keys_values.shape[2], *p.w.weight.shape):
                mix, x = narrow_mix(student, keys_values, *p.theta, p.w.weight)
                return Block(mix, p.w.bias.expand(student.shape[0], -1), x)
            return Block(*composed_mix(keys_values, *p.theta, *p.w), None)
        read = p.w.weight @ _value_times_key(p, teacher)  # [B, C, D]
        return Block(read @ p.theta.weight, read @ p.theta.bias + p.w.bias, None)

    def output(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Tensor:
        return self._whole(p, student, teacher, pool, None, residual=False)

    def transformed(
        self, p: Projections, student: Tensor, teacher: Tensor, pool: bool, norm: Norm | None, residual: bool
    ) -> Tensor:
        if fits_one_node(norm, student):
            return self._whole(p, student, teacher, pool, norm, residual)
        return super().transformed(p, student, teacher, pool, norm, residual)

    def _whole(
        self, p: Projections, student: Tensor, teacher: Tensor, pool: bool, norm: Norm | None, residual: bool
    ) -> Tensor:
        assert p.theta is not None and p.phi is not None
        return whole_dot_product(student, teacher, (p.phi, p.g, p.theta, p.w), pool, norm, residual)

    def flops(self, n: int, m: int, c: int, d: int) -> int:
        """Keys and values; the mix forward, its own gradient and the student's."""
        return 8 * n * c * d + 6 * n * c * c


def _few_keys(n: int, m: int, c: int, d: int) -> bool:
    """Whether two matrices [C, M] take fewer operations than one [C, C], forward and backward."""
    composed = 3 * (2 * m * d * d + 2 * c * d * d + 2 * c * c * d) + 6 * n * c * c
    # the products of width M are made once more in the backward pass
    return 12 * m * c * d + 14 * n * c * m < composed


def _value_times_key(p: Projections, teacher: Tensor) -> Tensor:
    """`value key^T / M` without sub-sampling, [B, D, D]."""
    if p.source is not None:
        key, value = keys_and_values(p, teacher, pool=False)
        return value @ key.mT / key.shape[2]
    # both are linear in the teacher map, so that its mean and covariance are all it takes
    assert p.phi is not None
    mean, cov = covariance(teacher, p.g.weight.dtype)
    mean_key, mean_value = F.linear(mean, *p.phi), F.linear(mean, *p.g)
    return p.g.weight @ cov @ p.phi.weight.T + mean_value[:, :, None] * mean_key[:, None, :]
