"""The arithmetic of the losses on whole maps: few operations, whatever the shape, for devices where each is a launch.

Maps stay in their own type, bfloat16 and float16 too: products add up in float32 inside the
device, moments and whatever does not grow with the map are float32.

Letters: B batch, C channels, D hidden channels, E channels of a projection, N positions, M keys, L any of the two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cankd_hf.losses.base import compute_dtype
from cankd_hf.losses.kernels.moments import EPS

HALF = frozenset({"cuda", "meta"})  # devices whose products and norms take bfloat16 and float16 beside float32


def whole_dtype(x: Tensor) -> torch.dtype:
    """The type of whole maps: that of the map itself where the device can compute in it, else `compute_dtype`."""
    return x.dtype if x.device.type in HALF else compute_dtype(x)


def whole_instance_distance(z: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """`0.5 * mean (IN(z) - IN(t))^2` [] of two maps [B, C, N] in the given type, differentiable once in z.

    Saves z, one map of differences and [B * C] vectors.
    """
    result: Tensor = _InstanceDistance.apply(z, t, dtype)
    return result


class _InstanceDistance(torch.autograd.Function):
    """A map's instance norm is torch's batch norm of [1, B * C, N]: one operation each way.

    Its gradient is linear in what comes in, here the difference times a number: the number goes in as the weight.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        rows, ctx.shape = z.reshape(1, -1, z.shape[-1]), z.shape
        difference, mean, inverse = _instance_norm(rows)
        difference.sub_(_instance_norm(t.reshape_as(rows))[0])
        ctx.save_for_backward(rows, difference, mean, inverse)
        # a sum in the wide type without a map in it
        squares: Tensor = torch.linalg.vector_norm(difference, dtype=dtype).square()
        return squares * (0.5 / z.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, difference, mean, inverse = ctx.saved_tensors
        weight = grad.to(mean.dtype).expand_as(mean) / rows.numel()
        grad_rows, _, _ = torch.ops.aten.native_batch_norm_backward(
            difference, rows, weight, None, None, mean, inverse, True, EPS, [True, False, False]
        )
        return grad_rows.view(ctx.shape), None, None


def _instance_norm(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows [1, B * C, N]; mean and inverse standard deviation [B * C]."""
    found: tuple[Tensor, Tensor, Tensor] = torch.native_batch_norm(rows, None, None, None, None, True, 0.0, EPS)
    return found


def whole_projection(teacher: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
    """`pool(conv(teacher))` [B, E, M] of a map [B, C, H, W], differentiable once in weight [E, C] and bias [E].

    The pool is 2x2 (floor). The projection has the type of weight and bias; the product is taken in the teacher's.
    """
    projected: Tensor = _Projection.apply(teacher, weight, bias, pool)
    return projected


class _Projection(torch.autograd.Function):
    """Saves what it is given only: a second projection costs less than the memory of the winners (8 bytes each)."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, weight: Tensor, bias: Tensor, pool: bool) -> Tensor:
        kernel, shift = weight[..., None, None].to(teacher.dtype), bias.to(teacher.dtype)
        ctx.save_for_backward(teacher, kernel, shift)
        ctx.pool = pool
        x = F.conv2d(teacher, kernel, shift)
        return (F.max_pool2d(x, 2) if pool else x).flatten(2).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        teacher, kernel, shift = ctx.saved_tensors
        before = grad.to(teacher.dtype)
        if ctx.pool:
            x = F.conv2d(teacher, kernel, shift)
            winner = F.max_pool2d(x, 2, return_indices=True)[1]
            before = torch.ops.aten.max_pool2d_with_indices_backward(
                before.reshape_as(winner), x, [2, 2], [2, 2], [0, 0], [1, 1], False, winner
            )
        before = before.reshape(*grad.shape[:2], *teacher.shape[2:])
        settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, groups
        _, of_kernel, of_shift = torch.ops.aten.convolution_backward(
            before, teacher, kernel, list(shift.shape), *settings, [False, True, True]
        )
        return None, of_kernel.flatten(1).to(grad.dtype), of_shift.to(grad.dtype), None


def whole_relu_read(a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    """`y_i = sum_j relu(a_i + b_j) v_j`, differentiable once; a [B, N], b [B, M], value [B, D, M], y [B, D, N].

    By sorting, as in `prefix_sums.py`. The gradient of the values is the same read with the roles of a and b changed.
    """
    result: Tensor = _ReluRead.apply(a, b, value)
    return result


class _ReluRead(torch.autograd.Function):
    """Saves its inputs, the prefix sums and how many keys each query reads."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, value: Tensor) -> Tensor:
        sums, reads = _prefix_sums(a, b, value)
        plain, weighted = _at(sums, reads).chunk(2, dim=1)
        ctx.save_for_backward(a, b, value, sums, reads)
        return torch.addcmul(weighted, a[:, None], plain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, value, sums, reads = ctx.saved_tensors
        grad_a = torch.linalg.vecdot(grad, _at(sums[:, : value.shape[1]], reads), dim=1)
        plain, weighted = _at(*_prefix_sums(b, a, grad)).chunk(2, dim=1)
        grad_b = torch.linalg.vecdot(value, plain, dim=1)
        return grad_a, grad_b, torch.addcmul(weighted, b[:, None], plain)


def _prefix_sums(a: Tensor, b: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the first k of v_j and of b_j v_j, in the order of falling b, [B, 2D, M + 1]; each query's k [B, N]."""
    falling, order = b.sort(dim=1, descending=True)
    reads = torch.searchsorted(-falling, a)
    x = _at(value, order)
    x = torch.cat([x, x * falling[:, None]], dim=1)
    # the positions come last: a scan over another dimension takes one thread of a GPU for each channel
    return F.pad(x, (1, 0)).cumsum_(2), reads


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Columns index [B, L] of x [B, E, M]: [B, E, L]."""
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


def whole_dot_product(
    student: Tensor, keys_values: Tensor, theta: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor]
) -> Tensor:
    """`w(P theta(s))` [B, C, N] with `P = value key^T / M` [B, D, D] for each image, differentiable once.

    Args:
        student: s, [B, C, N].
        keys_values: keys and values, one after the other, [B, 2D, M].
        theta: weight [D, C] and bias [D].
        w: weight [C, D] and bias [C].
    """
    result: Tensor = _DotProduct.apply(student, keys_values, *theta, *w)
    return result


class _DotProduct(torch.autograd.Function):
    """One node for the whole block: on small maps most of the time goes into the nodes of autograd."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, keys_values: Tensor, theta: Tensor, theta_bias: Tensor, w: Tensor, w_bias: Tensor
    ) -> Tensor:
        batch, _, m = keys_values.shape
        key, value = keys_values.chunk(2, dim=1)
        product = torch.baddbmm(w.new_empty(()), value, key.mT, beta=0, alpha=1 / m)
        read = w.expand(batch, -1, -1) @ product  # [B, C, D]
        mix = (read.flatten(0, 1) @ theta).unflatten(0, (batch, -1)).to(s.dtype)
        shift = torch.baddbmm(w_bias[:, None], read, theta_bias[:, None].expand(batch, -1, -1))
        ctx.save_for_backward(s, keys_values, theta, theta_bias, w, product, read, mix)
        return torch.baddbmm(shift.to(s.dtype), mix, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        s, keys_values, theta, theta_bias, w, product, read, mix = ctx.saved_tensors
        batch, _, m = keys_values.shape
        grad_s = mix.mT @ grad
        grad_mix = (grad @ s.mT).to(w.dtype)
        grad_shift = grad.sum(-1, keepdim=True, dtype=w.dtype)
        flat = read.flatten(0, 1)
        grad_theta = flat.mT @ grad_mix.flatten(0, 1)
        grad_theta_bias = flat.mT @ grad_shift.flatten()
        grad_read = torch.baddbmm(grad_shift * theta_bias, grad_mix, theta.mT.expand(batch, -1, -1))
        grad_w = (grad_read @ product.mT).sum(0)
        grad_product = w.mT.expand(batch, -1, -1) @ grad_read
        key, value = keys_values.chunk(2, dim=1)
        grad_keys_values = torch.empty_like(keys_values)
        of_key, of_value = grad_keys_values.chunk(2, dim=1)
        of_key.baddbmm_(grad_product.mT, value, beta=0, alpha=1 / m)
        of_value.baddbmm_(grad_product, key, beta=0, alpha=1 / m)
        return grad_s, grad_keys_values, grad_theta, grad_theta_bias, grad_w, grad_shift.sum((0, 2))
