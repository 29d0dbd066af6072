"""Softmax attention of projected queries over projected keys."""

from torch import Tensor

from cankd_hf.losses.affinities.base import Affinity, Block, Projections, keys_and_values, output_block, softmax_read
from cankd_hf.losses.kernels.whole import convolve, whole_projections


class EmbeddedGaussian(Affinity):
    """`f_ij = softmax_j <q_i, k_j>`, unscaled; the fast form is torch's blockwise attention."""

    value_range = "softmax"

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        return (query.mT @ key).softmax(dim=-1)

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        assert p.theta is not None
        key, value = keys_and_values(p, teacher, pool)
        query = p.theta.flat(student.to(key.dtype))
        return output_block(p, softmax_read(query.mT, key.mT, value.mT))

    def output(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Tensor:
        assert p.theta is not None and p.phi is not None
        keys_values, (theta, w) = whole_projections(teacher, (p.phi, p.g), (p.theta, p.w), pool)
        key, value = keys_values.chunk(2, dim=1)
        query = convolve(student.flatten(2), *theta)
        return convolve(softmax_read(query.mT, key.mT, value.mT).mT, *w).view_as(student)

    def flops(self, n: int, m: int, c: int, d: int) -> int:
        """Keys and values; query and output, three products each; attention, 2 products forward and 5 backward."""
        return 8 * n * c * d + 12 * n * c * d + 14 * n * m * d
