"""Softmax attention of the raw student map over the raw teacher map."""

import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.affinities.base import Affinity, Block, Projections, output_block, softmax_read, values
from cankd_hf.losses.kernels.projection import max_pool
from cankd_hf.losses.kernels.softmax import softmax_read_blocks
from cankd_hf.losses.kernels.whole import convolve, whole_projections


class Gaussian(Affinity):
    """`f_ij = softmax_j <s_i, pool(t)_j>` on the raw C channels, without theta and phi."""

    embeds = False
    value_range = "softmax"

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        return (query.mT @ key).softmax(dim=-1)

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        dtype = p.g.weight.dtype
        key = (max_pool(teacher) if pool else teacher.flatten(2)).to(dtype)
        value = values(p, teacher, pool)
        # torch's blockwise kernels want values as wide as queries: half of the product would be padding
        return output_block(p, softmax_read_blocks(student, key, value).mT)

    def output(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Tensor:
        value, (w,) = whole_projections(teacher, (p.g,), (p.w,), pool)
        key = (F.max_pool2d(teacher, 2) if pool else teacher).flatten(2)
        return convolve(softmax_read(student.flatten(2).mT, key.mT, value.mT).mT, *w).view_as(student)

    def flops(self, n: int, m: int, c: int, d: int) -> int:
        """Values; output; three products of C and three of D channels (the keys need no gradient)."""
        return 4 * n * c * d + 6 * n * c * d + 6 * n * m * (c + d)
