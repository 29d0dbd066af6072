"""The Can block of the dot product on whole maps as one node of autograd, from the maps to z.

Letters: B batch, C channels, D hidden channels, N positions, M keys, R rows of gradients (B or 1), P parameters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.losses.base import compute_dtype, differentiable_once
from cankd_hf.losses.kernels.whole import (
    HALF_TYPES,
    bias_gradient,
    convolution_gradients,
    project,
    unpool,
    weight_gradient,
)

Layers = Sequence[tuple[Tensor, Tensor]]


def whole_dot_product(
    student: Tensor, teacher: Tensor, layers: Layers, pool: bool, norm: nn.Module | None, residual: bool
) -> Tensor:
    """`z = norm(w(V K^T theta(s) / M)) + s` [B, C, H, W], with K and V pooled projections of t; differentiable once.

    Args:
        student: s, [B, C, H, W].
        teacher: t, the same shape and type; gets no gradient.
        layers: weight and bias of phi, g, theta and w.
        pool: whether to max-pool keys and values by 2x2 (floor).
        norm: the output norm, one that `fits_one_node`; its running statistics are updated in train mode.
        residual: whether to add s.
    """
    assert norm is None or isinstance(norm, nn.BatchNorm2d)
    affine = (None, None) if norm is None else (norm.weight, norm.bias)
    (phi, phi_bias), (g, g_bias), (theta, theta_bias), (w, w_bias) = layers
    parameters = (phi, g, phi_bias, g_bias, theta, w, theta_bias, w_bias)
    result: Tensor = _DotProduct.apply(student, teacher, pool, norm, residual, *affine, *parameters)
    return result


def fits_one_node(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether `whole_dot_product` takes the norm: one of torch's own, with parameters in the type to compute in.

    A momentum of None is a number that the host reads; torch.compile traces no buffers that change inside a node.
    """
    if norm is None:
        return True
    known = type(norm) is nn.BatchNorm2d and norm.weight.dtype == compute_dtype(x) and norm.momentum is not None
    return known and not torch.compiler.is_compiling()


class _Sizes(NamedTuple):
    """Views of all parameters in one row of P, in R rows that are one after the other or all the same."""

    c: int
    d: int

    def kernel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [R, 2D, C] and bias [R, 2D] of keys and values."""
        c, e = self.c, 2 * self.d
        return x[:, : e * c].view(-1, e, c), x[:, e * c : e * c + e]

    def others(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """theta's weight [R, D, C], w's weight [R, C, D], their biases [R, D] and [R, C]."""
        c, d = self.c, self.d
        sizes = [x.shape[1] - 2 * c * d - d - c, d * c, c * d, d, c]
        _, theta, w, theta_bias, w_bias = x.split_with_sizes(sizes, 1)
        return theta.view(-1, d, c), w.view(-1, c, d), theta_bias, w_bias


class _DotProduct(torch.autograd.Function):
    """The product of three takes the cheaper order: `(w V K^T) q`, or `w (V (K^T q))` for few keys.

    Saves the query, keys and values, the winners of the pool (8 bytes each) and products that do not grow with N; the
    output before the norm is made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        pool: bool,
        norm: nn.BatchNorm2d | None,
        residual: bool,
        weight: Tensor | None,
        shift: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        s, sizes = student.flatten(2), _Sizes(student.shape[1], parameters[4].shape[0])
        packed = torch.cat([parameter.view(-1) for parameter in parameters]).to(s.dtype)[None]
        kernel, bias = sizes.kernel(packed)
        theta, w, theta_bias, w_bias = sizes.others(packed.expand(s.shape[0], -1))
        keys_values, winner = project(teacher, kernel[0], bias[0]), None
        if pool:
            keys_values, winner = F.max_pool2d(keys_values, 2, return_indices=True)
        keys_values = keys_values.flatten(2)
        (key, value), n, m = keys_values.chunk(2, dim=1), s.shape[2], keys_values.shape[2]
        query = torch.baddbmm(theta_bias[..., None], theta, s)
        ctx.few = 2 * n * m < sizes.d * (n + m)
        inner = _scaled(key.mT, query, 1 / m) if ctx.few else _scaled(value, key.mT, 1 / m)
        read = torch.bmm(value, inner) if ctx.few else query
        mix = w if ctx.few else torch.bmm(w, inner)
        # statistics of the batch take the bias out again
        ctx.batch = norm is not None and (norm.training or norm.running_mean is None)
        z = _output(mix, read, None if ctx.batch else w_bias, student)
        statistics: tuple[Tensor | None, ...] = (None, None)
        if norm is not None:
            z, statistics = _normalise(norm, z, weight, shift, ctx.batch, parameters[-1])
        ctx.pool, ctx.norm, ctx.residual, ctx.sizes = pool, norm, residual, sizes
        ctx.parameters, ctx.dtype = [parameter.shape for parameter in parameters], parameters[0].dtype
        ctx.save_for_backward(student, teacher, packed, keys_values, winner, query, inner, mix, weight, *statistics)
        return z.add_(student) if residual else z

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        student, teacher, packed, keys_values, winner, query, inner, mix, weight, *statistics = ctx.saved_tensors
        s, (key, value), scale = student.flatten(2), keys_values.chunk(2, dim=1), 1 / keys_values.shape[2]
        theta, w, _, w_bias = ctx.sizes.others(packed.expand(s.shape[0], -1))
        read = torch.bmm(value, inner) if ctx.few else query
        of_output = grad
        of_affine: Sequence[Tensor | None] = (None, None)
        if ctx.norm is not None:
            o = _output(mix, read, None if ctx.batch else w_bias, student)
            of_output, *found = _norm_gradients(ctx, grad, o, weight, statistics)
            of_affine = found
            del o
        of_output = of_output.reshape(s.shape)
        # a gradient for each image where it weighs less than the maps, and one operation adds them up
        of_parameters = packed.new_empty(s.shape[0] if s.shape[2] >= s.shape[1] else 1, packed.shape[1])
        of_theta, of_w, of_theta_bias, of_w_bias = ctx.sizes.others(of_parameters)
        of_w_bias.zero_() if ctx.batch else bias_gradient(of_output, of_w_bias)
        of_keys_values = torch.empty_like(keys_values)
        of_key, of_value = of_keys_values.chunk(2, dim=1)
        if ctx.few:
            weight_gradient(of_output, read, of_w)
            of_read = torch.bmm(w.mT, of_output)
            of_inner = _scaled(value.mT, of_read, scale)
            of_value.baddbmm_(of_read, inner.mT, beta=0)
            of_key.baddbmm_(query, of_inner.mT, beta=0)
            of_query = torch.bmm(key, of_inner)
        else:
            of_mix = torch.bmm(of_output, query.mT)
            weight_gradient(of_mix, inner, of_w)
            of_inner = _scaled(w.mT, of_mix, scale)
            of_value.baddbmm_(of_inner, key, beta=0)
            of_key.baddbmm_(of_inner.mT, value, beta=0)
            of_query = torch.bmm(mix.mT, of_output)
        del of_output, read
        weight_gradient(of_query, s, of_theta)
        bias_gradient(of_query, of_theta_bias)
        # nothing else reads z, so that its gradient is ours to write to
        of_s = grad.view(s.shape).baddbmm_(theta.mT, of_query) if ctx.residual else torch.bmm(theta.mT, of_query)
        del of_query
        pieces = _parameter_gradients(ctx, of_keys_values, winner, teacher, of_parameters)
        return of_s.view(student.shape), None, None, None, None, *of_affine, *pieces


def _parameter_gradients(
    ctx: Any, of_keys_values: Tensor, winner: Tensor | None, teacher: Tensor, of_parameters: Tensor
) -> list[Tensor]:
    """Adds keys and values to the gradients [R, P]; those of all parameters, in their shapes and type."""
    shape = (*of_keys_values.shape[:2], *teacher.shape[2:])
    if winner is None:
        grad = of_keys_values.view(shape)
    else:
        grad = unpool(of_keys_values, teacher if teacher.shape == shape else teacher.new_empty(shape), winner)
    if teacher.dtype in HALF_TYPES:
        of_kernel, of_bias = ctx.sizes.kernel(of_parameters)
        weight_gradient(grad.flatten(2), teacher.flatten(2), of_kernel)
        bias_gradient(grad.flatten(2), of_bias)
        flat = torch.sum(of_parameters, 0, dtype=ctx.dtype)
    else:
        own = [one.flatten() for one in convolution_gradients(grad, teacher)]
        others = of_parameters[:, sum(map(len, own)) :].sum(0)
        flat = torch.cat([*own, others]).to(ctx.dtype)
    pieces = flat.split_with_sizes([shape.numel() for shape in ctx.parameters])
    return [piece.view(shape) for piece, shape in zip(pieces, ctx.parameters, strict=True)]


def _normalise(
    norm: nn.BatchNorm2d, x: Tensor, weight: Tensor | None, shift: Tensor | None, batch: bool, bias: Tensor
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The norm of x, and what its gradient needs: statistics of the batch, or the running ones.

    With statistics of the batch x comes without the bias of the layer before, [C], which the running mean then gets.
    """
    running = (norm.running_mean, norm.running_var) if norm.training or not batch else (None, None)
    z, mean, inverse = torch.native_batch_norm(x, weight, shift, *running, batch, norm.momentum or 0.0, norm.eps)
    if norm.training and norm.running_mean is not None and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        norm.running_mean.add_(bias, alpha=norm.momentum or 0.0)
    return z, (mean, inverse) if batch else running


def _norm_gradients(ctx: Any, grad: Tensor, o: Tensor, weight: Tensor, statistics: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the norm's input, weight and bias."""
    kept = (None, None, *statistics) if ctx.batch else (*statistics, None, None)
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        grad, o, weight, *kept, ctx.batch, ctx.norm.eps, [True, True, True]
    )
    return found


def _output(mix: Tensor, read: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """`mix read + bias` shaped as the map `like` [B, C, H, W]."""
    o = torch.bmm(mix, read) if bias is None else torch.baddbmm(bias[..., None], mix, read)
    return o.view(like.shape)


def _scaled(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    # in place: otherwise a GPU copies the tensor that is multiplied by 0
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=alpha)
