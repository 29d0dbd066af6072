"""Distances between maps from their moments: one pass forward, one multiply-add pass backward.

Both losses here compare maps through means, variances and covariances over the positions of each image and channel,
so that is all the forward pass keeps: [B, C] vectors instead of normalised maps [B, C, N].

Letters: B batch, C channels, K channels of the mixed map, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cankd_hf.losses.base import compute_dtype
from cankd_hf.losses.blocks import blocks

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
    return x[images, :, positions] - mean[images, :, None]


class _PairMoments(torch.autograd.Function):
    """Moments of s and t; saves s, t and [B, C] vectors only."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        dtype = compute_dtype(s)
        mean_s, mean_t = _mean(s, dtype), _mean(t, dtype)
        sums = mean_s.new_zeros(3, *mean_s.shape)
        for where in _blocks(s):
            sc, tc = _centred(s, mean_s, where), _centred(t, mean_t, where)
            for total, (a, b) in zip(sums, ((sc, sc), (tc, tc), (sc, tc)), strict=True):
                total[where[0]] += (a * b).sum(-1)
        sums /= s.shape[-1]
        ctx.save_for_backward(s, t, mean_s, mean_t)
        var_s, var_t, cov_st = sums.unbind()
        ctx.mark_non_differentiable(mean_t, var_t)
        return mean_s, mean_t, var_s, var_t, cov_st

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_mean: Tensor, _t: Tensor, g_var: Tensor, _v: Tensor, g_cov: Tensor) -> tuple[Any, ...]:
        s, t, mean_s, mean_t = ctx.saved_tensors
        n = s.shape[-1]
        grad = torch.empty_like(s)
        a, b = (2 / n) * g_var, g_cov / n
        # one multiply-add pass: grad = a s + b t + c
        c = g_mean / n - a * mean_s - b * mean_t
        for images, positions in _blocks(s):
            block = torch.addcmul(c[images, :, None], a[images, :, None], s[images, :, positions])
            grad[images, :, positions] = block.addcmul_(b[images, :, None], t[images, :, positions])
        return grad, None


class _MixMoments(torch.autograd.Function):
    """Moments of s, t and o = mix x. Saves its inputs and o (or, for maps in less than float32, computes o again)."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, mix: Tensor, x: Tensor | None) -> tuple[Tensor, ...]:
        dtype = compute_dtype(s)
        source = s if x is None else x
        mean_s, mean_t = _mean(s, dtype), _mean(t, dtype)
        mean_x = mean_s.clone() if x is None else _mean(x, dtype)
        o = torch.empty_like(s) if s.dtype == dtype else None
        sums = mean_s.new_zeros(6, *mean_s.shape)
        for where in _blocks(s):
            sc, tc = _centred(s, mean_s, where), _centred(t, mean_t, where)
            oc = mix[where[0]] @ (sc if x is None else _centred(source, mean_x, where))
            if o is not None:
                o[where[0], :, where[1]] = oc
            pairs = ((sc, sc), (tc, tc), (sc, tc), (oc, oc), (sc, oc), (oc, tc))
            for total, (a, b) in zip(sums, pairs, strict=True):
                total[where[0]] += (a * b).sum(-1)
        sums /= s.shape[-1]
        ctx.save_for_backward(s, t, mix, x, mean_s, mean_t, mean_x, o)
        var_s, var_t, cov_st, var_o, cov_so, cov_ot = sums.unbind()
        ctx.mark_non_differentiable(mean_t, var_t)
        return mean_s, mean_t, var_s, var_t, cov_st, mean_x, var_o, cov_so, cov_ot

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s, t, mix, x, mean_s, mean_t, mean_x, o = ctx.saved_tensors
        g_mean_s, _, g_var_s, _, g_cov_st, g_mean_x, g_var_o, g_cov_so, g_cov_ot = (g / s.shape[-1] for g in grads)
        grad_s, grad_mix = torch.empty_like(s), torch.zeros_like(mix)
        grad_x = None if x is None else torch.empty_like(x)
        for where in _blocks(s):
            images, positions = where
            sc, tc = _centred(s, mean_s, where), _centred(t, mean_t, where)
            xc = sc if x is None else _centred(x, mean_x, where)
            oc = mix[images] @ xc if o is None else o[images, :, positions]

            def times(grad: Tensor, value: Tensor, images: slice = images) -> Tensor:
                return grad[images, :, None] * value

            do = times(2 * g_var_o, oc) + times(g_cov_so, sc) + times(g_cov_ot, tc)
            ds = times(2 * g_var_s, sc) + times(g_cov_so, oc) + times(g_cov_st, tc) + g_mean_s[images, :, None]
            dx = mix[images].mT @ do + g_mean_x[images, :, None]
            grad_mix[images] += do @ xc.mT
            if grad_x is None:
                ds += dx
            else:
                grad_x[images, :, positions] = dx
            grad_s[images, :, positions] = ds
        return grad_s, None, grad_mix, grad_x
