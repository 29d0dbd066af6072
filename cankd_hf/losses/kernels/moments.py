"""Distances between maps from their moments: one pass forward, one multiply-add pass backward.

Both losses here compare maps through means, variances and covariances over the positions of each image and channel,
so that is all the forward pass keeps: [B, C] vectors instead of normalised maps [B, C, N].

Letters: B batch, C channels, K channels of the mixed map, N positions.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cankd_hf.losses.base import compute_dtype
from cankd_hf.losses.kernels.blocks import blocks

EPS = 1e-5  # of InstanceNorm2d and BatchNorm2d, as in the authors' code


class PairMoments(NamedTuple):
    """Moments of two maps over their positions, each [B, C]; variances are biased (divided by N)."""

    mean_s: Tensor
    mean_t: Tensor
    var_s: Tensor
    var_t: Tensor
    cov_st: Tensor


class MixMoments(NamedTuple):
    """Moments of student s, teacher t and mixed map o = mix x, each [B, C] (mean_x: [B, K]); variances are biased."""

    mean_s: Tensor
    mean_t: Tensor
    var_s: Tensor
    var_t: Tensor
    cov_st: Tensor
    mean_x: Tensor
    var_o: Tensor
    cov_so: Tensor
    cov_ot: Tensor


def pair_moments(student: Tensor, teacher: Tensor) -> PairMoments:
    """Moments of two maps [B, C, N], differentiable once in the student's."""
    return PairMoments(*_PairMoments.apply(student, teacher))


def mix_moments(student: Tensor, teacher: Tensor, mix: Tensor, mixed: Tensor | None = None) -> MixMoments:
    """Moments of s, t and o = mix x, where x is the student itself or another map.

    Args:
        student: s, [B, C, N].
        teacher: t, [B, C, N]; gets no gradient.
        mix: one channel matrix for each image, [B, C, K], in the type to compute in.
        mixed: x, [B, K, N]; None for the student (then K = C), whose two gradients are then one pass.
    """
    return MixMoments(*_MixMoments.apply(student, teacher, mix, mixed))


def instance_distance(var_z: Tensor, var_t: Tensor, cov_zt: Tensor) -> Tensor:
    """`0.5 * mean (IN(z) - IN(t))^2` [] from biased variances and covariance over positions, each [B, C].

    A normalised map has mean 0 and mean square v / (v + eps), and the mean product of the two is
    cov / sqrt((vz + eps)(vt + eps)); expanding the square leaves these three terms.
    """
    z, t = var_z + EPS, var_t + EPS
    return 0.5 * (var_z / z + var_t / t - 2 * cov_zt * (z * t).rsqrt()).mean()


def plain_distance(mean_z: Tensor, mean_t: Tensor, var_z: Tensor, var_t: Tensor, cov_zt: Tensor) -> Tensor:
    """`0.5 * mean (z - t)^2` [] from means, biased variances and covariance over positions, each [B, C]."""
    return 0.5 * (var_z + var_t - 2 * cov_zt + (mean_z - mean_t).square()).mean()


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of (images, positions) of a map [B, C, N]."""
    return blocks(x.device, x.shape[0], x.shape[2], x.shape[1])


def _mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.mean(-1, dtype=dtype)


def _centred(x: Tensor, mean: Tensor, where: tuple[slice, slice]) -> Tensor:
    """One block of x less its mean, in the mean's type: never a whole map in that type."""
    images, positions = where
    return (x[images, :, positions] - mean[images, :, None]).to(mean.dtype)


def _add_products(sums: Tensor, images: slice, *pairs: tuple[Tensor, Tensor]) -> None:
    """Add the products of two blocks, summed over positions, to rows of sums [number of pairs, B, C]."""
    for total, (a, b) in zip(sums, pairs, strict=True):
        total[images] += torch.linalg.vecdot(a, b)


class _PairMoments(torch.autograd.Function):
    """Moments of s and t; saves s, t and [B, C] vectors only."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        dtype = compute_dtype(s)
        mean_s, mean_t = _mean(s, dtype), _mean(t, dtype)
        sums = mean_s.new_zeros(3, *mean_s.shape)
        for where in _blocks(s):
            sc, tc = _centred(s, mean_s, where), _centred(t, mean_t, where)
            _add_products(sums, where[0], (sc, sc), (tc, tc), (sc, tc))
        var_s, var_t, cov_st = sums.div_(s.shape[-1]).unbind()
        ctx.save_for_backward(s, t, mean_s, mean_t)
        ctx.mark_non_differentiable(mean_t, var_t)
        return mean_s, mean_t, var_s, var_t, cov_st

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s, t, mean_s, mean_t = ctx.saved_tensors
        g_mean, _, g_var, _, g_cov = (grad[..., None] / s.shape[-1] for grad in grads)
        grad_s = torch.empty_like(s)
        # one multiply-add pass, a s + b t + constant
        a, b = 2 * g_var, g_cov
        constant = g_mean - a * mean_s[..., None] - b * mean_t[..., None]
        for images, positions in _blocks(s):
            block = a[images] * s[images, :, positions]
            block.addcmul_(b[images], t[images, :, positions].to(block.dtype)).add_(constant[images])
            grad_s[images, :, positions] = block
        return grad_s, None


class _MixMoments(torch.autograd.Function):
    """Moments of s, t and o = mix x.

    Saves its inputs and, where o is a mix of the student in its own type, o: with another map x or with maps in less
    than float32, o would weigh more than computing it again.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, mix: Tensor, x: Tensor | None) -> tuple[Tensor, ...]:
        dtype = compute_dtype(s)
        mean_s, mean_t = _mean(s, dtype), _mean(t, dtype)
        mean_x = mean_s.clone() if x is None else _mean(x, dtype)
        o = torch.empty_like(s) if x is None and s.dtype == dtype else None
        sums = mean_s.new_zeros(6, *mean_s.shape)
        for where in _blocks(s):
            sc, tc = _centred(s, mean_s, where), _centred(t, mean_t, where)
            xc = sc if x is None else _centred(x, mean_x, where)
            oc = mix[where[0]] @ xc if o is None else _fill(o, where, mix, xc)
            _add_products(sums, where[0], (sc, sc), (tc, tc), (sc, tc), (oc, oc), (sc, oc), (oc, tc))
        ctx.save_for_backward(s, t, mix, x, mean_s, mean_t, mean_x, o)
        var_s, var_t, cov_st, var_o, cov_so, cov_ot = sums.div_(s.shape[-1]).unbind()
        ctx.mark_non_differentiable(mean_t, var_t)
        return mean_s, mean_t, var_s, var_t, cov_st, mean_x, var_o, cov_so, cov_ot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s, t, mix, x, mean_s, mean_t, mean_x, o = ctx.saved_tensors
        n = s.shape[-1]
        g_mean_s, _, g_var_s, _, g_cov_st, g_mean_x, g_var_o, g_cov_so, g_cov_ot = (g[..., None] / n for g in grads)
        grad_s, grad_mix, transposed = torch.empty_like(s), torch.zeros_like(mix), mix.mT
        grad_x = None if x is None else torch.empty_like(x)
        if x is None:
            g_mean_s = g_mean_s + g_mean_x
        for where in _blocks(s):
            images, positions = where
            sc, tc = _centred(s, mean_s, where), _centred(t, mean_t, where)
            xc = sc if x is None else _centred(x, mean_x, where)
            oc = mix[images] @ xc if o is None else o[images, :, positions]
            grad_o = (2 * g_var_o[images]) * oc
            grad_o.addcmul_(g_cov_so[images], sc).addcmul_(g_cov_ot[images], tc)
            grad_mix[images].baddbmm_(grad_o, xc.mT)
            block = (2 * g_var_s[images]) * sc
            block.addcmul_(g_cov_so[images], oc).addcmul_(g_cov_st[images], tc).add_(g_mean_s[images])
            if grad_x is None:
                block.baddbmm_(transposed[images], grad_o)
            else:
                of_x = grad_x[images, :, positions].baddbmm_(transposed[images], grad_o, beta=0)
                of_x.add_(g_mean_x[images])
            grad_s[images, :, positions] = block
        return grad_s, None, grad_mix, grad_x


def _fill(o: Tensor, where: tuple[slice, slice], mix: Tensor, xc: Tensor) -> Tensor:
    """Write one block of mix x into o, without a copy; returns the block."""
    images, positions = where
    return o[images, :, positions].baddbmm_(mix[images], xc, beta=0)
