"""Softmax attention of the raw student map over the raw teacher map."""

from torch import Tensor

from cankd_hf.losses.affinities.base import Affinity, Block, Projections, output_block, softmax_read, working_dtype
from cankd_hf.losses.kernels.projection import max_pool, project


class Gaussian(Affinity):
    """`f_ij = softmax_j <s_i, pool(t)_j>` on the raw C channels, without theta and phi."""

    embeds = False
    value_range = "softmax"

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        return (query.mT @ key).softmax(dim=-1)

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        key = max_pool(teacher) if pool else teacher.flatten(2)
        value = project(teacher, *p.g, pool)
        return output_block(p, softmax_read(student.mT.to(working_dtype(student)), key.mT, value.mT))

    def flops(self, n: int, m: int, c: int, d: int) -> int:
        """Values; output; three products of C and three of D channels (the keys need no gradient)."""
        return 4 * n * c * d + 6 * n * c * d + 6 * n * m * (c + d)
