"""The arithmetic of the losses on whole maps: few operations, whatever the shape, for devices where each is a launch.

Letters: B batch, C channels, D hidden channels, N positions, M keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cankd_hf.losses.kernels.moments import EPS


def whole_instance_distance(z: Tensor, t: Tensor) -> Tensor:
    """`0.5 * mean (IN(z) - IN(t))^2` [] of two maps [B, C, N] of one type, differentiable once in z.

    Saves the two maps and [B, C] vectors, no normalised map.
    """
    result: Tensor = _InstanceDistance.apply(z, t)
    return result


class _InstanceDistance(torch.autograd.Function):
    """With i_z, i_t the inverse standard deviations and r = cov i_z i_t: `1 - mean (r + eps (i_z^2 + i_t^2) / 2)`.

    Its gradient is `a (z - mean_z) + b (t - mean_t)` with a = i_z^2 (r + eps i_z^2) / BCN and b = -i_z i_t / BCN.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor) -> Tensor:
        positions = z.shape[-1]
        var_z, mean_z = torch.var_mean(z, -1, correction=0, keepdim=True)
        var_t, mean_t = torch.var_mean(t, -1, correction=0, keepdim=True)
        centred_z, centred_t = (z - mean_z).view(-1, 1, positions), (t - mean_t).view(-1, positions, 1)
        cov = torch.baddbmm(z.new_empty(()), centred_z, centred_t, beta=0, alpha=1 / positions).view_as(var_z)
        inverse_z, inverse_t = (var_z + EPS).rsqrt(), (var_t + EPS).rsqrt()
        both, square_z = inverse_z * inverse_t, inverse_z.square()
        r = cov * both
        ctx.save_for_backward(z, t, mean_z, mean_t, both, square_z, r)
        return 1 - torch.add(r, torch.addcmul(square_z, inverse_t, inverse_t), alpha=EPS / 2).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, t, mean_z, mean_t, both, square_z, r = ctx.saved_tensors
        grad = grad / z.numel()
        a = torch.add(r, square_z, alpha=EPS).mul_(square_z).mul_(grad)
        return (z - mean_z).mul_(a).addcmul_(both * grad, t - mean_t, value=-1), None


def whole_mix(
    keys_values: Tensor, theta: Tensor, theta_bias: Tensor, w: Tensor, w_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`w P theta` [B, C, C] and `w P theta_bias + w_bias` [B, C] with `P = value key^T / M`, differentiable once.

    Args:
        keys_values: keys and values, one after the other, [B, 2D, M].
        theta: [D, C].
        theta_bias: [D].
        w: [C, D].
        w_bias: [C].
    """
    mix, bias = _Mix.apply(keys_values, theta, theta_bias, w, w_bias)
    return mix, bias[..., 0]


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keys_values: Tensor, theta: Tensor, theta_bias: Tensor, w: Tensor, w_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, _, m = keys_values.shape
        key, value = keys_values.chunk(2, dim=1)
        product = torch.baddbmm(w.new_empty(()), value, key.mT, beta=0, alpha=1 / m)
        read = w.expand(batch, -1, -1) @ product  # [B, C, D]
        ctx.save_for_backward(keys_values, theta, theta_bias, w, product, read)
        mix = read.flatten(0, 1) @ theta
        bias = torch.baddbmm(w_bias[:, None], read, theta_bias[:, None].expand(batch, -1, -1))
        return mix.unflatten(0, (batch, -1)), bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mix: Tensor, grad_bias: Tensor) -> tuple[Tensor, ...]:
        keys_values, theta, theta_bias, w, product, read = ctx.saved_tensors
        batch, _, m = keys_values.shape
        key, value = keys_values.chunk(2, dim=1)
        flat = read.flatten(0, 1)
        grad_theta = flat.mT @ grad_mix.flatten(0, 1)
        grad_theta_bias = flat.mT @ grad_bias.flatten()
        grad_read = torch.baddbmm(grad_bias * theta_bias, grad_mix, theta.mT.expand(batch, -1, -1))
        grad_w = (grad_read @ product.mT).sum(0)
        grad_product = w.mT.expand(batch, -1, -1) @ grad_read
        grad = torch.empty_like(keys_values)
        of_key, of_value = grad.chunk(2, dim=1)
        of_key.baddbmm_(grad_product.mT, value, beta=0, alpha=1 / m)
        of_value.baddbmm_(grad_product, key, beta=0, alpha=1 / m)
        return grad, grad_theta, grad_theta_bias, grad_w, grad_bias[..., 0].sum(0)
