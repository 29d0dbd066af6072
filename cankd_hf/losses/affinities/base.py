"""Base class of the affinities of the Can block, and products that several of them share.

Letters: B batch, C channels, D hidden channels, E channels of a projection, N student positions (queries), M teacher
positions after pooling (keys), K channels of the mixed map.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.losses.kernels.blocks import alone
from cankd_hf.losses.kernels.output_norm import whole_norm
from cankd_hf.losses.kernels.projection import max_pool, project

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


class Projection(NamedTuple):
    """A 1x1 convolution as a matrix: weight [E, C] and bias [E], in the type to compute in."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution of a map [B, C, H, W], as published: [B, E, H, W]."""
        return F.conv2d(x, self.weight[..., None, None], self.bias)

    def flat(self, x: Tensor) -> Tensor:
        """The same of a map [B, C, N]; torch's matmul of a matrix and a batch copies the whole map first."""
        return torch.baddbmm(self.bias[:, None], self.weight.expand(x.shape[0], -1, -1), x)


def as_matrix(conv: nn.Conv2d, dtype: torch.dtype | None) -> Projection:
    """A 1x1 convolution as a matrix of the given type; None: its parameters as they are."""
    assert conv.bias is not None
    if dtype is None:
        return Projection(conv.weight, conv.bias)
    return Projection(conv.weight.flatten(1).to(dtype), conv.bias.to(dtype))


class Projections(NamedTuple):
    """The parameters of a Can block that an affinity works with."""

    theta: Projection | None  # None for an affinity that does not embed
    phi: Projection | None
    g: Projection
    w: Projection
    extra: Tensor | None  # the affinity's own parameters, flattened
    source: Tensor | None = None  # student map [B, C, H, W] that values are made of; None: they are the teacher's


class Block(NamedTuple):
    """A Can block before its norm as `o = mix x + bias`: mix [B, C, K], bias [B, C], x [B, K, N].

    x is None where it is the student map itself (then K = C).
    """

    mix: Tensor
    bias: Tensor
    x: Tensor | None


class Affinity:
    """How much of teacher position j each student position i reads: f(q_i, k_j), as published and in its fast form.

    To add one, derive from this class in a file of its own and name it in `AFFINITIES`.

    Attributes:
        embeds: whether queries and keys are projected (theta and phi), or are the raw maps.
        value_range: f is of either sign, at least 0, or softmax weights (at least 0, summing to 1 over the keys).
        narrow: whether `output` works on bfloat16 and float16 maps as they are; if not, it gets float32.
    """

    embeds: ClassVar[bool] = True
    narrow: ClassVar[bool] = True
    value_range: ClassVar[Literal["signed", "non-negative", "softmax"]]

    def extra(self, hidden_channels: int) -> nn.Conv2d | None:
        """A new layer with further parameters of the affinity, or None; `concat` in the loss, `p.extra` here."""
        return None

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        """f [B, N, M], from queries [B, D, N] and keys [B, D, M]; D is C where the affinity does not embed."""
        raise NotImplementedError

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        """The block's output before its norm, without a tensor of N * M values.

        Args:
            p: the block's parameters.
            student: student map [B, C, N].
            teacher: teacher map [B, C, H, W].
            pool: whether keys and values are pooled.
        """
        raise NotImplementedError

    def output(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Tensor:
        """The block's output before its norm [B, C, H, W] on whole maps, for devices where each operation is a launch.

        The parameters are those of the layers, unchanged; both maps [B, C, H, W] are contiguous and of one type.
        """
        raise NotImplementedError

    def transformed(
        self, p: Projections, student: Tensor, teacher: Tensor, pool: bool, norm: Norm | None, residual: bool
    ) -> Tensor:
        """The block with its norm and residual, z [B, C, H, W], of the maps that `output` takes."""
        # one name for o and z: a map that nothing needs any more is freed
        z = self.output(p, student, teacher, pool)
        if norm is not None:
            z = whole_norm(norm, z)
        return z + student if residual else z

    def flops(self, n: int, m: int, c: int, d: int) -> int:
        """FLOPs of `block` and of the products after it that grow with N, for one image, forward and backward."""
        return 0

    def published_copies(self, hidden_channels: int) -> int:
        """Lower bound of the number of [N, M] matrices in memory in the backward pass of the published form."""
        return 3


def keys_and_values(p: Projections, teacher: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """Keys and values [B, D, M], of the teacher map [B, C, H, W] in one pass."""
    if p.source is not None:
        assert p.phi is not None
        return project(teacher, *p.phi, pool), values(p, teacher, pool)
    key, value = joined_keys_and_values(p, teacher, pool).chunk(2, dim=1)
    return key, value


def joined_keys_and_values(p: Projections, teacher: Tensor, pool: bool) -> Tensor:
    """The same as one tensor [B, 2D, M], keys first."""
    if p.source is not None:
        return torch.cat(keys_and_values(p, teacher, pool), dim=1)
    assert p.phi is not None
    with alone():
        weight, bias = torch.cat([p.phi.weight, p.g.weight]), torch.cat([p.phi.bias, p.g.bias])
    return project(teacher, weight, bias, pool)


def values(p: Projections, teacher: Tensor, pool: bool) -> Tensor:
    """Values [B, D, M] of the teacher map [B, C, H, W], or of the student's with its gradient."""
    if p.source is None:
        return project(teacher, *p.g, pool)
    value = p.g(p.source.to(p.g.weight.dtype))
    return max_pool(value) if pool else value.flatten(2)


def softmax_read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(query key^T) value`, [B, N, D], blockwise.

    The blockwise kernels want equal widths of query and value, and some a multiple of 8: padded with zeros.
    """
    hidden = value.shape[2]
    width = -(-max(query.shape[2], hidden) // 8) * 8
    short = [(x, width - x.shape[2]) for x in (query, key, value)]
    query, key, value = ((F.pad(x, (0, more)) if more else x)[:, None].contiguous() for x, more in short)
    read = F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)
    return read if hidden == width else read[..., :hidden]  # each index is a copy of the gradient


def output_block(p: Projections, read: Tensor) -> Block:
    """The block `w(y)` from what each position reads, y [B, N, D]."""
    batch = read.shape[0]
    return Block(p.w.weight.expand(batch, -1, -1), p.w.bias.expand(batch, -1), read.mT)
