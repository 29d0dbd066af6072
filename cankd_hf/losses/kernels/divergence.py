"""Divergence of distributions from their logits."""

from typing import Any

import torch
from torch import Tensor

from cankd_hf.losses.base import without_autocast
from cankd_hf.losses.kernels.blocks import Piece, Where, alone_but_for_run, cut, on_whole_maps, run

SMALL = 1 << 19  # values: below, the operations of a block cost more than its exponentials


def divergence(student: Tensor, teacher: Tensor, dim: int, temperature: float = 1.0) -> Tensor:
    """`KL(softmax(t / T) || softmax(s / T))` along a dimension, in the shape of the logits without it."""
    log_q, log_p = ((x / temperature if temperature != 1 else x).log_softmax(dim) for x in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(dim)


def mean_divergence(student: Tensor, teacher: Tensor, dim: int, temperature: float = 1.0) -> Tensor:
    """The mean [] of `divergence`; no gradient flows into the teacher.

    Of large logits on a CPU both softmaxes are taken once for value and gradient, block by block: with L the logarithm
    of the sum of exponentials, the value is `sum p (t - s - L(t) + L(s))` and its gradient `(q - p) / T`.

    Args:
        student: logits [B, ...].
        teacher: the same.
        dim: of the classes: 1 or the last one.
        temperature: T.
    """
    small = student.numel() < SMALL or torch.compiler.is_compiling()
    if small or on_whole_maps(student.device):
        return divergence(student, teacher.detach(), dim, temperature).mean()
    last = dim in (-1, student.dim() - 1)
    s, t = (x.reshape(1, -1, x.shape[-1]) if last else x.flatten(2) for x in (student, teacher))
    total: Tensor = _Divergence.apply(s, t.detach(), 2 if last else 1, 1 / temperature)
    return total * (student.shape[dim] / student.numel())


class _Divergence(torch.autograd.Function):
    """The sum of the divergences of logits [B, N, K] or, with axis 1, [B, K, N], which are divided by 1 / scale."""

    @staticmethod
    @alone_but_for_run
    def forward(ctx: Any, student: Tensor, teacher: Tensor, axis: int, scale: float) -> Tensor:
        ctx.axis, ctx.scale = axis, scale
        made = cut(student.device, *(student.shape[place] for place in (0, 3 - axis, axis)))
        gradient = torch.empty_like(student)
        sums: list[list[Tensor]] = [[] for _ in made.pieces]

        def work(piece: Piece, where: Where) -> None:
            here = where if axis == 2 else (where[0], slice(None), where[1])
            s, t = student[here], teacher[here]
            if scale != 1:
                s, t = s * scale, t * scale
            q, p = s.softmax(axis), t.softmax(axis)
            largest_t, largest_s, likeliest_p, likeliest_q = (x.amax(axis, True) for x in (t, s, p, q))
            # L(t) - L(s), as the logit of the likeliest class is L and the logarithm of its probability
            norms = largest_t.sub_(largest_s).sub_(likeliest_p.div_(likeliest_q).log_())
            apart = (t - s).sub_(norms)
            sums[piece.number].append(torch.dot(p.flatten(), apart.flatten()))
            torch.sub(q, p, out=gradient[here])

        run(made, work)
        ctx.save_for_backward(gradient, student, teacher)
        return torch.stack([value for piece in sums for value in piece]).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        difference, student, teacher = ctx.saved_tensors
        with without_autocast(grad.device):
            if torch.is_grad_enabled():  # somebody differentiates the gradient
                q, p = ((x * ctx.scale).softmax(ctx.axis) for x in (student, teacher))
                difference = q - p
            return difference * (grad * ctx.scale), None, None, None
