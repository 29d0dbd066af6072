"""Keys and values: 1x1 convolutions of the teacher map, max-pooled, without the map before the pool.

Letters: B batch, C channels, E channels of the projections, M positions after pooling, r x w cells of a block.
"""

from typing import Any

import torch
from torch import Tensor

from cankd_hf.losses.base import differentiable_once
from cankd_hf.losses.kernels.blocks import Cut, Piece, Where, alone_but_for_run, cut, run


def project(teacher: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    """`pool(conv(teacher))`, the pool being 2x2 (floor), differentiable once in weight and bias.

    The teacher map [B, C, H, W] gets no gradient; weight [E, C] and bias [E] are in the type to compute in; H and W
    are at least 2 where it is pooled. Returns the projection [B, E, M].
    """
    projected: Tensor = _Projection.apply(teacher, weight, bias, pool)
    return projected


def covariance(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean [B, C] and biased covariance over positions [B, C, C] of a map [B, C, H, W]; no gradient."""
    flat = x.detach().flatten(2)
    batch, channels, positions = flat.shape
    mean = flat.mean(-1, dtype=dtype)
    made = cut(x.device, batch, positions, channels, channels * channels)
    total = mean.new_zeros(made.slots, batch, channels, channels)

    def add(piece: Piece, where: Where) -> None:
        images, columns = where
        centred = flat[images, :, columns] - mean[images, :, None]
        total[piece.slot, images].baddbmm_(centred, centred.mT)

    run(made, add)
    return mean, total.sum(0) / positions


def max_pool(x: Tensor) -> Tensor:
    """2x2 max-pool (floor) of a map [B, C, H, W] as [B, C, M]; torch's own is many times slower on the CPU."""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = torch.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
    return torch.maximum(rows[..., 0::2], rows[..., 1::2]).flatten(2)


class _Projection(torch.autograd.Function):
    """Saves the teacher map it was given and, when pooling, which of four cells won: one byte a value."""

    @staticmethod
    @alone_but_for_run
    def forward(ctx: Any, teacher: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
        cells = (teacher.shape[2] // 2) * (teacher.shape[3] // 2) if pool else teacher[0, 0].numel()
        out = weight.new_empty(teacher.shape[0], weight.shape[0], cells)
        winner = torch.empty_like(out, dtype=torch.uint8) if pool else None

        def fill(_: Piece, where: Where) -> None:
            images, to, x = _cells(teacher, where, pool, weight.dtype)
            y = weight.expand(x.shape[0], -1, -1) @ x
            if winner is not None:
                y, winner[images, :, to] = _max_of_four(y.unflatten(2, (4, -1)))
            # a bias moves all four cells of a pool alike, so it is added after it
            torch.add(y, bias[:, None], out=out[images, :, to])

        run(_cut(teacher, weight, pool), fill)
        ctx.save_for_backward(teacher, weight, winner)
        return out

    @staticmethod
    @differentiable_once
    @alone_but_for_run
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        teacher, weight, winner = ctx.saved_tensors
        made = _cut(teacher, weight, winner is not None, weight.numel())
        grad_weight = weight.new_zeros(len(made.pieces), *weight.shape)
        grad_bias = weight.new_zeros(len(made.pieces), weight.shape[0])

        def add(piece: Piece, where: Where) -> None:
            images, to, x = _cells(teacher, where, winner is not None, weight.dtype)
            g = grad[images, :, to]
            grad_bias[piece.number] += g.sum((0, 2))
            if winner is not None:
                # each gradient goes to the cell that won, the other three get 0
                four = g.new_zeros(*g.shape[:2], 4, g.shape[2])
                g = four.scatter_(2, winner[images, :, None, to].long(), g[:, :, None]).flatten(2)
            for one_g, one_x in zip(g, x, strict=True):
                grad_weight[piece.number].addmm_(one_g, one_x.mT)

        run(made, add)
        return None, grad_weight.sum(0), grad_bias.sum(0), None


def _cut(teacher: Tensor, weight: Tensor, pool: bool, kept: int = 0) -> Cut:
    """Blocks of (images, positions) of a map [B, C, H, W], with pooling of (images, pairs of rows)."""
    batch, channels, height, width = teacher.shape
    widest = max(channels, weight.shape[0])
    if not pool:
        return cut(teacher.device, batch, height * width, widest, kept)
    return cut(teacher.device, batch, height // 2, 2 * width * widest, kept)


def _cells(teacher: Tensor, where: Where, pool: bool, dtype: torch.dtype) -> tuple[slice, slice, Tensor]:
    """One block of the map as (images, where it goes in [B, E, M], x [b, C, n]).

    With pooling x is [b, C, 4 * r * w], the four cells of each pool one after the other, so that the maximum is
    taken over four contiguous pieces.
    """
    images, units = where
    if not pool:
        return images, units, teacher.flatten(2)[images, :, units].to(dtype)
    w = teacher.shape[3] // 2
    x = teacher[images, :, 2 * units.start : 2 * units.stop, : 2 * w]
    x = x.unflatten(3, (w, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4)  # [b, C, 2, 2, r, w]
    return images, slice(units.start * w, units.stop * w), x.to(dtype).flatten(2)


def _max_of_four(y: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over dim 2 of [b, E, 4, n], and which of the four it is (the first of equals), uint8."""
    a, b, c, d = y.unbind(2)
    top, bottom = torch.maximum(a, b), torch.maximum(c, d)
    lower, in_top, in_bottom = ((high > low).view(torch.uint8) for high, low in ((bottom, top), (b, a), (d, c)))
    # arithmetic on bytes: torch.where is tens of times slower on the CPU
    return torch.maximum(top, bottom), in_top + lower * (2 + in_bottom - in_top)
