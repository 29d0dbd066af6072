"""The arithmetic of the losses on whole maps: few operations, whatever the shape, for devices where each is a launch.

Maps stay in their own type, bfloat16 and float16 too: products add up in float32 inside the
device, moments and whatever does not grow with the map are float32.

Letters: B batch, C channels, D hidden channels, E channels of a projection, N positions, M keys, L any of the two.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.base import compute_dtype, differentiable_once
from cankd_hf.losses.kernels.moments import EPS

HALF_TYPES = (torch.bfloat16, torch.float16)
HALF = frozenset({"cuda", "meta"})  # devices whose products and norms take bfloat16 and float16 beside float32


def whole_dtype(x: Tensor) -> torch.dtype:
    """The type of whole maps: that of the map itself where the device can compute in it, else `compute_dtype`."""
    return x.dtype if x.device.type in HALF else compute_dtype(x)


def whole_instance_distance(z: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """`0.5 * mean (IN(z) - IN(t))^2` [] of two maps [B, C, H, W] in the given type, differentiable once in z.

    Saves z, one map of differences and [B * C] vectors.
    """
    result: Tensor = _InstanceDistance.apply(z, t, dtype)
    return result


class _InstanceDistance(torch.autograd.Function):
    """A map's instance norm is torch's layer norm of [B * C, N]: one kernel of a GPU, three as a batch norm.

    The gradient is that of a batch norm of [1, B * C, N], linear in what comes in: here the difference times a number,
    which goes in as the weight.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        rows, ctx.shape = z.view(-1, z.shape[2] * z.shape[3]), z.shape
        difference, mean, inverse = _instance_norm(rows)
        difference.sub_(_instance_norm(t.view(rows.shape))[0])
        ctx.save_for_backward(rows, difference, mean, inverse)
        # a sum in the wide type without a map in it
        norm = torch.linalg.vector_norm(difference, dtype=dtype).view(1)
        # half of the mean square in one launch
        return torch.addr(norm[None], norm, norm, beta=0, alpha=0.5 / z.numel()).view(())

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, difference, mean, inverse = ctx.saved_tensors
        weight = grad.to(mean.dtype).expand(rows.shape[0]) / rows.numel()
        statistics = (None, None, mean.view(-1), inverse.view(-1), True, EPS)
        grad_rows, _, _ = torch.ops.aten.native_batch_norm_backward(
            difference[None], rows[None], weight, *statistics, [True, False, False]
        )
        return grad_rows.view(ctx.shape), None, None


def _instance_norm(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows [B * C, N]; mean and inverse standard deviation [B * C, 1]."""
    found: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(rows, rows.shape[1:], None, None, EPS)
    return found


def whole_projections(
    teacher: Tensor, projected: Sequence[tuple[Tensor, Tensor]], others: Sequence[tuple[Tensor, Tensor]], pool: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`pool(conv(teacher))` [B, E, M] of all `projected` layers, one after the other, and the `others` ready for use.

    Differentiable once. All layers are packed and converted to the teacher's type in two operations, and so are their
    gradients.

    Args:
        teacher: [B, C, H, W]; gets no gradient.
        projected: weight and bias of 1x1 convolutions of the teacher.
        others: weight and bias of further 1x1 convolutions.
        pool: whether to max-pool the projections by 2x2 (floor).

    Returns:
        The projections, and weight [E, C] and bias [E] of each other layer in the teacher's type.
    """
    layers = [*projected, *others]
    parameters = [weight for weight, _ in layers] + [bias for _, bias in layers]
    projection, *rest = _Projections.apply(teacher, pool, len(projected), *parameters)
    return projection, list(zip(rest[: len(others)], rest[len(others) :], strict=True))


class _Projections(torch.autograd.Function):
    """Saves what it is given only: a second projection costs less than the memory of the winners (8 bytes each)."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, pool: bool, projected: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        packed = torch.cat([parameter.flatten() for parameter in parameters]).to(teacher.dtype)
        ctx.parameters = [(parameter.shape, parameter.dtype) for parameter in parameters]
        half = len(parameters) // 2
        pieces = packed.split([parameter.numel() for parameter in parameters])
        weights = [piece.view(len(bias), -1) for piece, bias in zip(pieces, pieces[half:], strict=False)]
        kernel = packed[: sum(weight.numel() for weight in weights[:projected])].view(-1, teacher.shape[1])
        start = sum(piece.numel() for piece in pieces[:half])
        shift = packed[start : start + len(kernel)]
        ctx.save_for_backward(teacher, kernel, shift)
        ctx.pool = pool
        x = project(teacher, kernel, shift)
        x = F.max_pool2d(x, 2) if pool else x
        return x.flatten(2), *weights[projected:], *pieces[half + projected :]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Any, ...]:
        teacher, kernel, shift = ctx.saved_tensors
        if ctx.pool:
            x = project(teacher, kernel, shift)
            winner = F.max_pool2d(x, 2, return_indices=True)[1]
            grad = unpool(grad, x, winner)
        of_kernel, of_shift = convolution_gradients(grad.reshape(*grad.shape[:2], *teacher.shape[2:]), teacher)
        half = len(others) // 2
        grads = [of_kernel, *others[:half], of_shift, *others[half:]]
        flat = torch.cat([one.flatten() for one in grads]).to(ctx.parameters[0][1])
        pieces = flat.split([shape.numel() for shape, _ in ctx.parameters])
        return None, None, None, *(piece.view(shape) for piece, (shape, _) in zip(pieces, ctx.parameters, strict=True))


def unpool(grad: Tensor, like: Tensor, winner: Tensor) -> Tensor:
    """The gradient of a map before the 2x2 max-pool, shaped as `like` (not read), from grad [B, E, M]."""
    settings = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # size, stride, padding, dilation, no ceiling
    found: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(grad.reshape_as(winner), like, *settings, winner)
    return found


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The 1x1 convolution [B, E, H, W] of a map [B, C, H, W] with weight [E, C] and bias [E].

    In float32 torch's convolution is faster than its product (TF32); in half precision it costs the host more.
    """
    if x.dtype not in HALF_TYPES:
        return F.conv2d(x, weight[..., None, None], bias)
    product = torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x.flatten(2))
    return product.view(len(x), -1, *x.shape[2:])


def convolution_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight [E, C] and bias [E] of `project`, summed over images."""
    if x.dtype in HALF_TYPES:
        return _weight_gradient(grad.flatten(2), x.flatten(2)), grad.sum((0, 2, 3))
    settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, not transposed, groups
    weight = x.new_empty(grad.shape[1], x.shape[1], 1, 1)  # its shape alone is read
    _, of_weight, of_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], *settings, [False, True, True]
    )
    return of_weight, of_bias


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`sum_b grad x^T` [E, K] of grad [B, E, N] and x [B, K, N], without a tensor larger than the maps."""
    if x.shape[2] < x.shape[1]:
        rows, columns = (y.transpose(0, 1).flatten(1) for y in (grad, x))
        product: Tensor = torch.mm(rows, columns.mT)
        return product
    return torch.bmm(grad, x.mT).sum(0)


def weight_gradient(grad: Tensor, x: Tensor, to: Tensor) -> None:
    """Writes `grad x^T` of grad [B, E, N] and x [B, K, N] into `to`: [B, E, K], or their sum [1, E, K]."""
    if to.shape[0] == grad.shape[0]:
        to.baddbmm_(grad, x.mT, beta=0)
    else:
        rows, columns = (y.transpose(0, 1).flatten(1) for y in (grad, x))
        to[0].addmm_(rows, columns.mT, beta=0)


def bias_gradient(grad: Tensor, to: Tensor) -> None:
    """Writes the sums of grad [B, E, N] over positions into `to`: [B, E], or over images too [1, E]."""
    to, over = (to, [2]) if to.shape[0] == grad.shape[0] else (to[0], [0, 2])
    if torch.compiler.is_compiling():  # it takes no `out` that is a piece of a tensor
        to.copy_(grad.sum(over))
    else:
        torch.sum(grad, over, out=to)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution of a map [B, C, N] with weight [E, C] and bias [E] of its type: [B, E, N]."""
    return F.conv1d(x, weight[..., None], bias)


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
    @differentiable_once
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
