"""Keys and values: 1x1 convolutions of the teacher map, max-pooled, without the map before the pool.

Letters: B batch, C channels, E channels of the projections, M positions after pooling, r x w cells of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cankd_hf.losses.kernels.blocks import blocks, on_whole_maps
from cankd_hf.losses.kernels.whole import whole_projection


def project(teacher: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    """`pool(conv(teacher))`, the pool being 2x2 (floor), differentiable once in weight and bias.

    The teacher map [B, C, H, W] gets no gradient; weight [E, C] and bias [E] are in the type to compute in; H and W
    are at least 2 where it is pooled. Returns the projection [B, E, M].
    """
    if on_whole_maps(teacher.device):
        return whole_projection(teacher, weight, bias, pool)
    projected: Tensor = _Projection.apply(teacher, weight, pool)
    # a bias moves all four cells of a pool alike, so it is added after it
    return projected.add_(bias[:, None])


def covariance(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean [B, C] and biased covariance over positions [B, C, C] of a map [B, C, H, W]; no gradient."""
    flat = x.detach().flatten(2)
    batch, channels, positions = flat.shape
    mean = flat.mean(-1, dtype=dtype)
    total = mean.new_zeros(batch, channels, channels)
    for images, columns in blocks(x.device, batch, positions, channels):
        centred = flat[images, :, columns] - mean[images, :, None]
        total[images].baddbmm_(centred, centred.mT)
    return mean, total / positions


def max_pool(x: Tensor) -> Tensor:
    """2x2 max-pool (floor) of a map [B, C, H, W] as [B, C, M]; torch's own is many times slower on the CPU."""
    if on_whole_maps(x.device):
        return F.max_pool2d(x, 2).flatten(2)
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = torch.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
    return torch.maximum(rows[..., 0::2], rows[..., 1::2]).flatten(2)


class _Projection(torch.autograd.Function):
    """Saves the teacher map it was given and, when pooling, which of four cells won: one byte a value."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, weight: Tensor, pool: bool) -> Tensor:
        cells = (teacher.shape[2] // 2) * (teacher.shape[3] // 2) if pool else teacher[0, 0].numel()
        out = weight.new_empty(teacher.shape[0], weight.shape[0], cells)
        winner = torch.empty_like(out, dtype=torch.uint8) if pool else None
        for images, where, x in _cells(teacher, weight, pool):
            y = weight.expand(x.shape[0], -1, -1) @ x
            if winner is None:
                out[images, :, where] = y
            else:
                out[images, :, where], winner[images, :, where] = _max_of_four(y.unflatten(2, (4, -1)))
        ctx.save_for_backward(teacher, weight, winner)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        teacher, weight, winner = ctx.saved_tensors
        grad_weight = torch.zeros_like(weight)
        for images, where, x in _cells(teacher, weight, winner is not None):
            g = grad[images, :, where]
            if winner is not None:
                won = winner[images, :, where]
                g = torch.cat([g * _as_numbers(won == cell, g.dtype) for cell in range(4)], dim=2)
            for one_g, one_x in zip(g, x, strict=True):
                grad_weight.addmm_(one_g, one_x.mT)
        return None, grad_weight, None


def _cells(teacher: Tensor, weight: Tensor, pool: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of the map as (images, where they go in [B, E, M], x [b, C, n]).

    With pooling x is [b, C, 4 * r * w], the four cells of each pool one after the other, so that the maximum is
    taken over four contiguous pieces.
    """
    batch, channels, height, width = teacher.shape
    widest = max(channels, weight.shape[0])
    if not pool:
        flat = teacher.flatten(2)
        for images, where in blocks(teacher.device, batch, height * width, widest):
            yield images, where, flat[images, :, where].to(weight.dtype)
        return
    w = width // 2
    for images, rows in blocks(teacher.device, batch, height // 2, 2 * width * widest):
        x = teacher[images, :, 2 * rows.start : 2 * rows.stop, : 2 * w]
        x = x.unflatten(3, (w, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4)  # [b, C, 2, 2, r, w]
        yield images, slice(rows.start * w, rows.stop * w), x.to(weight.dtype).flatten(2)


def _max_of_four(y: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over dim 2 of [b, E, 4, n], and which of the four it is (the first of equals), uint8."""
    a, b, c, d = y.unbind(2)
    top, bottom = torch.maximum(a, b), torch.maximum(c, d)
    lower, in_top, in_bottom = ((high > low).view(torch.uint8) for high, low in ((bottom, top), (b, a), (d, c)))
    # arithmetic on bytes: torch.where is tens of times slower on the CPU
    return torch.maximum(top, bottom), in_top + lower * (2 + in_bottom - in_top)


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as 0 and 1; from bytes, because bool has no fast conversion on the CPU."""
    return mask.view(torch.uint8).to(dtype)
