"""The Can block without a softmax as one channel matrix for each image.

Letters: B batch, C channels, D hidden channels, M keys.
"""

from typing import Any

import torch
from torch import Tensor

from cankd_hf.losses.base import differentiable_once
from cankd_hf.losses.kernels.blocks import Piece, Where, alone_but_for_run, cut, run


def composed_mix(
    keys_values: Tensor, theta: Tensor, theta_bias: Tensor, w: Tensor, w_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`w P theta` [B, C, C] and `w P theta_bias + w_bias` [B, C] with `P = value key^T / M`, differentiable once.

    An image is computed by one thread.

    Args:
        keys_values: keys and values, one after the other, [B, 2D, M].
        theta: [D, C].
        theta_bias: [D].
        w: [C, D].
        w_bias: [C].
    """
    mix, bias = _Composition.apply(keys_values, theta, theta_bias, w, w_bias)
    return mix, bias


class _Composition(torch.autograd.Function):
    """Saves its inputs, P and w P."""

    @staticmethod
    @alone_but_for_run
    def forward(
        ctx: Any, keys_values: Tensor, theta: Tensor, theta_bias: Tensor, w: Tensor, w_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, channels, hidden = keys_values.shape[0], *w.shape
        product, read = w.new_empty(batch, hidden, hidden), w.new_empty(batch, channels, hidden)
        mix, bias = w.new_empty(batch, channels, channels), w.new_empty(batch, channels)

        def fill(_: Piece, where: Where) -> None:
            for image in range(batch)[where[0]]:
                key, value = keys_values[image].chunk(2)
                torch.addmm(product[image], value, key.mT, beta=0, alpha=1 / key.shape[1], out=product[image])
                torch.mm(w, product[image], out=read[image])
                torch.mm(read[image], theta, out=mix[image])
                torch.addmv(w_bias, read[image], theta_bias, out=bias[image])

        run(cut(w.device, batch, 1, channels * channels), fill)
        ctx.save_for_backward(keys_values, theta, theta_bias, w, product, read)
        return mix, bias

    @staticmethod
    @differentiable_once
    @alone_but_for_run
    def backward(ctx: Any, grad_mix: Tensor, grad_bias: Tensor) -> tuple[Tensor, ...]:
        keys_values, theta, theta_bias, w, product, read = ctx.saved_tensors
        batch, made = keys_values.shape[0], cut(w.device, keys_values.shape[0], 1, w.shape[0] ** 2)
        grad = torch.empty_like(keys_values)
        grad_theta, grad_w = (x.new_zeros(len(made.pieces), *x.shape) for x in (theta, w))
        grad_theta_bias = theta_bias.new_zeros(len(made.pieces), *theta_bias.shape)

        def add(piece: Piece, where: Where) -> None:
            for image in range(batch)[where[0]]:
                key, value = keys_values[image].chunk(2)
                grad_theta[piece.number].addmm_(read[image].mT, grad_mix[image])
                grad_theta_bias[piece.number].addmv_(read[image].mT, grad_bias[image])
                grad_read = torch.addmm(torch.outer(grad_bias[image], theta_bias), grad_mix[image], theta.mT)
                grad_w[piece.number].addmm_(grad_read, product[image].mT)
                grad_product = (w.mT @ grad_read).div_(key.shape[1])
                of_key, of_value = grad[image].chunk(2)
                torch.mm(grad_product.mT, value, out=of_key)
                torch.mm(grad_product, key, out=of_value)

        run(made, add)
        return grad, grad_theta.sum(0), grad_theta_bias.sum(0), grad_w.sum(0), grad_bias.sum(0)


def narrow_mix(
    student: Tensor, keys_values: Tensor, theta: Tensor, theta_bias: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """`w value / M` [B, C, M] and `key^T (theta s + theta_bias)` [B, M, N]; their product is the block less its bias.

    For maps with few keys: nothing is as large as [C, C]. Arguments as for `composed_mix`; s is [B, C, N].
    """
    mix, x = _Narrow.apply(student, keys_values, theta, theta_bias, w)
    return mix, x


class _Narrow(torch.autograd.Function):
    """Saves its inputs and `key^T theta`."""

    @staticmethod
    @alone_but_for_run
    def forward(
        ctx: Any, student: Tensor, keys_values: Tensor, theta: Tensor, theta_bias: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, keys = keys_values.shape[0], keys_values.shape[2]
        query_of = w.new_empty(batch, keys, theta.shape[1])
        mix, x = w.new_empty(batch, w.shape[0], keys), w.new_empty(batch, keys, student.shape[2])

        def fill(_: Piece, where: Where) -> None:
            for image in range(batch)[where[0]]:
                key, value = keys_values[image].chunk(2)
                torch.mm(key.mT, theta, out=query_of[image])
                torch.addmm((key.mT @ theta_bias)[:, None], query_of[image], student[image].to(w.dtype), out=x[image])
                torch.addmm(mix[image], w, value, beta=0, alpha=1 / keys, out=mix[image])

        run(cut(w.device, batch, 1, student[0].numel()), fill)
        ctx.save_for_backward(student, keys_values, theta, theta_bias, w, query_of)
        return mix, x

    @staticmethod
    @differentiable_once
    @alone_but_for_run
    def backward(ctx: Any, grad_mix: Tensor, grad_x: Tensor) -> tuple[Tensor, ...]:
        student, keys_values, theta, theta_bias, w, query_of = ctx.saved_tensors
        batch, made = keys_values.shape[0], cut(w.device, keys_values.shape[0], 1, student[0].numel())
        grad, grad_student = torch.empty_like(keys_values), torch.empty_like(student)
        grad_theta, grad_w = (x.new_zeros(len(made.pieces), *x.shape) for x in (theta, w))
        grad_theta_bias = theta_bias.new_zeros(len(made.pieces), *theta_bias.shape)

        def add(piece: Piece, where: Where) -> None:
            for image in range(batch)[where[0]]:
                key, value = keys_values[image].chunk(2)
                of_key, of_value = grad[image].chunk(2)
                of_mix = grad_mix[image] / key.shape[1]
                grad_w[piece.number].addmm_(of_mix, value.mT)
                torch.mm(w.mT, of_mix, out=of_value)
                grad_student[image] = query_of[image].mT @ grad_x[image]
                of_query, total = grad_x[image] @ student[image].to(w.dtype).mT, grad_x[image].sum(1)
                torch.addmm(torch.outer(theta_bias, total), theta, of_query.mT, out=of_key)
                grad_theta[piece.number].addmm_(key, of_query)
                grad_theta_bias[piece.number].addmv_(key, total)

        run(made, add)
        return grad_student, grad, grad_theta.sum(0), grad_theta_bias.sum(0), grad_w.sum(0)
