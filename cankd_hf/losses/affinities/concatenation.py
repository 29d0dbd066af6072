"""The product of a learned vector with the concatenation of query and key."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.losses.affinities.base import Affinity, Block, Projection, Projections, keys_and_values, output_block
from cankd_hf.losses.kernels.prefix_sums import relu_read
from cankd_hf.losses.kernels.whole import convolve, whole_projections, whole_relu_read


class Concatenation(Affinity):
    """`f_ij = relu(a . q_i + b . k_j) / M`.

    It is a sum of one number per query and one per key: the fast form sorts the keys, and each query reads a prefix.
    """

    value_range = "non-negative"
    narrow = False  # sums over thousands of keys

    def extra(self, hidden_channels: int) -> nn.Conv2d:
        """The vector [a, b], weight [1, 2D, 1, 1]."""
        return nn.Conv2d(2 * hidden_channels, 1, 1, bias=False)

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        """f [B, N, M], over a tensor of all pairs [B, 2D, N, M]."""
        assert p.extra is not None
        n, m = query.shape[2], key.shape[2]
        pairs = torch.cat([query[..., None].expand(-1, -1, -1, m), key[:, :, None].expand(-1, -1, n, -1)], dim=1)
        return F.relu(F.conv2d(pairs, p.extra.view(1, -1, 1, 1)))[:, 0] / m

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        """`o = w y`, y from prefix sums over the sorted keys."""
        assert p.theta is not None and p.extra is not None
        for_query, for_key = p.extra.chunk(2)
        key, value = keys_and_values(p, teacher, pool)
        of_query = Projection((for_query @ p.theta.weight)[None], (for_query @ p.theta.bias)[None])
        a = of_query.flat(student.to(key.dtype))
        b = Projection(for_key[None], for_key.new_zeros(1)).flat(key)
        return output_block(p, relu_read(a[:, 0], b[:, 0], value.mT))

    def output(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Tensor:
        assert p.theta is not None and p.phi is not None and p.extra is not None
        keys_values, (theta, (w, bias)) = whole_projections(teacher, (p.phi, p.g), (p.theta, p.w), pool)
        key, value = keys_values.chunk(2, dim=1)
        for_query, for_key = p.extra.to(student.dtype).chunk(2)
        a, b = convolve(convolve(student.flatten(2), *theta), for_query[None]), convolve(key, for_key[None])
        read = whole_relu_read(a.squeeze(1), b.squeeze(1), value)
        return convolve(read, w / key.shape[2], bias).view_as(student)

    def flops(self, n: int, m: int, c: int, d: int) -> int:
        """Keys and values; output, three products."""
        return 8 * n * c * d + 6 * n * c * d

    def published_copies(self, hidden_channels: int) -> int:
        """With the tensor of all pairs, [2D, N, M], and its gradient."""
        return 3 + 4 * hidden_channels
