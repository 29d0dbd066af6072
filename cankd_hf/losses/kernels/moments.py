"""Distances between maps from their moments: one pass forward, one multiply-add pass backward.

Both losses here compare maps through means, variances and covariances over the positions of each image and channel,
so that is all the forward pass keeps: [B, C] vectors instead of normalised maps [B, C, N].

Letters: B batch, C channels, K channels of the mixed map, N positions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cankd_hf.losses.base import compute_dtype, differentiable_once
from cankd_hf.losses.kernels.blocks import Cut, Piece, Where, alone_but_for_run, cut, run

EPS = 1e-5  # of InstanceNorm2d and BatchNorm2d, as in the authors' code


class PairMoments(NamedTuple):
    """Moments of two maps over their positions, each [B, C]; variances are biased (divided by N)."""

    mean_s: Tensor
    mean_t: Tensor
    var_s: Tensor
    var_t: Tensor
    cov_st: Tensor


class MixMoments(NamedTuple):
    """Moments of student s, teacher t and mixed map o = mix x, each [B, C]; variances are biased."""

    mean_s: Tensor
    mean_t: Tensor
    var_s: Tensor
    var_t: Tensor
    cov_st: Tensor
    mean_o: Tensor
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


def _cut(x: Tensor, kept: int = 0) -> Cut:
    """Blocks of (images, positions) of a map [B, C, N]."""
    return cut(x.device, x.shape[0], x.shape[2], x.shape[1], kept)


def _means(dtype: torch.dtype, *maps: Tensor) -> list[Tensor]:
    """Means of maps [B, C, N] over their positions, [B, C] each."""
    made = _cut(maps[0])
    sums = [x.new_zeros(made.slots, *x.shape[:2], dtype=dtype) for x in maps]

    def add(piece: Piece, where: Where) -> None:
        images, positions = where
        for total, x in zip(sums, maps, strict=True):
            total[piece.slot, images] += x[images, :, positions].sum(-1, dtype=dtype)

    run(made, add)
    return [total.sum(0).div_(x.shape[2]) for total, x in zip(sums, maps, strict=True)]


def _centred(x: Tensor, mean: Tensor, where: Where) -> Tensor:
    """One block of x less its mean, in the mean's type: never a whole map in that type."""
    images, positions = where
    return (x[images, :, positions] - mean[images, :, None]).to(mean.dtype)


def _rows(x: Tensor, mean: Tensor, where: Where) -> Tensor:
    """The same with its positions next to each other in memory: operations on two orders are many times slower."""
    return _centred(x, mean, where).contiguous()


def _add_products(sums: Tensor, images: slice, *pairs: tuple[Tensor, Tensor]) -> None:
    """Add the products of two blocks, summed over positions, to rows of sums [number of pairs, B, C]."""
    for total, (a, b) in zip(sums, pairs, strict=True):
        total[images] += torch.linalg.vecdot(a, b)


class _PairMoments(torch.autograd.Function):
    """Moments of s and t; saves s, t and [B, C] vectors only."""

    @staticmethod
    @alone_but_for_run
    def forward(ctx: Any, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        made = _cut(s)
        mean_s, mean_t = _means(compute_dtype(s), s, t)
        sums = mean_s.new_zeros(made.slots, 3, *mean_s.shape)

        def add(piece: Piece, where: Where) -> None:
            sc, tc = _centred(s, mean_s, where), _centred(t, mean_t, where)
            _add_products(sums[piece.slot], where[0], (sc, sc), (tc, tc), (sc, tc))

        run(made, add)
        var_s, var_t, cov_st = sums.sum(0).div_(s.shape[-1]).unbind()
        ctx.save_for_backward(s, t, mean_s, mean_t)
        ctx.mark_non_differentiable(mean_t, var_t)
        return mean_s, mean_t, var_s, var_t, cov_st

    @staticmethod
    @differentiable_once
    @alone_but_for_run
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s, t, mean_s, mean_t = ctx.saved_tensors
        g_mean, _, g_var, _, g_cov = (grad[..., None] / s.shape[-1] for grad in grads)
        grad_s = torch.empty_like(s)
        # one multiply-add pass, a s + b t + constant
        a, b = 2 * g_var, g_cov
        constant = g_mean - a * mean_s[..., None] - b * mean_t[..., None]

        def fill(_: Piece, where: Where) -> None:
            images, positions = where
            block = a[images] * s[images, :, positions]
            block.addcmul_(b[images], t[images, :, positions].to(block.dtype)).add_(constant[images])
            grad_s[images, :, positions] = block

        run(_cut(s), fill)
        return grad_s, None


class _MixMoments(torch.autograd.Function):
    """Moments of s, t and o = mix x.

    Saves its inputs and, where o is a mix of the student in its own type, o: with another map x or with maps in less
    than float32, o would weigh more than computing it again.
    """

    @staticmethod
    @alone_but_for_run
    def forward(ctx: Any, s: Tensor, t: Tensor, mix: Tensor, x: Tensor | None) -> tuple[Tensor, ...]:
        dtype, made = compute_dtype(s), _cut(s)
        mean_s, mean_t, *of_x = _means(dtype, s, t) if x is None else _means(dtype, s, t, x)
        mean_x = of_x[0] if of_x else mean_s
        o = torch.empty_like(s) if x is None and s.dtype == dtype else None
        sums = mean_s.new_zeros(made.slots, 6, *mean_s.shape)

        def add(piece: Piece, where: Where) -> None:
            sc, tc = _rows(s, mean_s, where), _rows(t, mean_t, where)
            xc = sc if x is None else _rows(x, mean_x, where)
            oc = mix[where[0]] @ xc if o is None else _fill(o, where, mix, xc)
            pairs = (sc, sc), (tc, tc), (sc, tc), (oc, oc), (sc, oc), (oc, tc)
            _add_products(sums[piece.slot], where[0], *pairs)

        run(made, add)
        ctx.save_for_backward(s, t, mix, x, mean_s, mean_t, None if x is None else mean_x, o)
        var_s, var_t, cov_st, var_o, cov_so, cov_ot = sums.sum(0).div_(s.shape[-1]).unbind()
        ctx.mark_non_differentiable(mean_t, var_t)
        mean_o = (mix @ mean_x[..., None])[..., 0]
        return mean_s, mean_t, var_s, var_t, cov_st, mean_o, var_o, cov_so, cov_ot

    @staticmethod
    @differentiable_once
    @alone_but_for_run
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        s, t, mix, x, mean_s, mean_t, mean_x, o = ctx.saved_tensors
        n, made = s.shape[-1], _cut(s, mix[0].numel())
        g_mean_s, _, g_var_s, _, g_cov_st, g_mean_o, g_var_o, g_cov_so, g_cov_ot = (g[..., None] / n for g in grads)
        g_var_o, g_var_s = 2 * g_var_o, 2 * g_var_s
        g_mean_x = mix.mT @ g_mean_o
        if x is None:
            g_mean_s = g_mean_s + g_mean_x
        grad_s, grad_x = torch.empty_like(s), None if x is None else torch.empty_like(x)
        grad_mix, transposed = mix.new_zeros(made.slots, *mix.shape), mix.mT
        torch.mul(n * g_mean_o, (mean_s if x is None else mean_x)[:, None], out=grad_mix[0])

        def add(piece: Piece, where: Where) -> None:
            images, positions = where
            sc, tc = _rows(s, mean_s, where), _rows(t, mean_t, where)
            xc = sc if x is None else _rows(x, mean_x, where)
            oc = mix[images] @ xc if o is None else o[images, :, positions]
            grad_o = g_var_o[images] * oc
            grad_o.addcmul_(g_cov_so[images], sc).addcmul_(g_cov_ot[images], tc)
            grad_mix[piece.slot, images].baddbmm_(grad_o, xc.mT)
            # of s, in place of s
            block = sc.mul_(g_var_s[images]) if grad_x is None else g_var_s[images] * sc
            block.addcmul_(g_cov_so[images], oc).addcmul_(g_cov_st[images], tc).add_(g_mean_s[images])
            if grad_x is None:
                block.baddbmm_(transposed[images], grad_o)
            else:
                of_x = grad_x[images, :, positions].baddbmm_(transposed[images], grad_o, beta=0)
                of_x.add_(g_mean_x[images])
            grad_s[images, :, positions] = block

        run(made, add)
        return grad_s, None, grad_mix[0] if made.slots == 1 else grad_mix.sum(0), grad_x


def _fill(o: Tensor, where: Where, mix: Tensor, xc: Tensor) -> Tensor:
    """Write one block of mix x into o, without a copy; returns the block."""
    images, positions = where
    return o[images, :, positions].baddbmm_(mix[images], xc, beta=0)
