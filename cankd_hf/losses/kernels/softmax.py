"""Reading with softmax weights on the CPU, a block of queries at a time; keys and values may differ in width.

Letters: B batch, C channels of queries and keys, D channels of values, N queries, M keys.
"""

from typing import Any

import torch
from torch import Tensor

from cankd_hf.losses.base import differentiable_once
from cankd_hf.losses.kernels.blocks import BLOCK_CPU, Cut, Piece, Where, alone_but_for_run, cut, run

QUERIES = 512  # in a block, if a map is as large: with fewer the products would wait for the keys


def softmax_read_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`y_i = sum_j softmax_j(<q_i, k_j>) v_j`, [B, D, N], differentiable once in query and value.

    query is [B, C, N], of any type; key [B, C, M] and value [B, D, M] are in the type to compute in. The weights are
    computed again in the backward pass, unless they take no more memory than the queries.
    """
    result: Tensor = _SoftmaxRead.apply(query, key, value)
    return result


class _SoftmaxRead(torch.autograd.Function):
    @staticmethod
    @alone_but_for_run
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, channels, queries = query.shape
        y, keys = value.new_empty(batch, value.shape[1], queries), key.shape[2]
        kept = value.new_empty(batch, queries, keys) if keys <= channels else None

        def fill(_: Piece, where: Where) -> None:
            for image in range(batch)[where[0]]:
                to = None if kept is None else kept[image, where[1]]
                weights = _weights(query[image, :, where[1]], key[image], to)
                y[image, :, where[1]] = value[image] @ weights.mT

        run(_cut(query, key), fill)
        ctx.save_for_backward(query, key, value, y, kept)
        return y

    @staticmethod
    @differentiable_once
    @alone_but_for_run
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, y, kept = ctx.saved_tensors
        made = _cut(query, key, value[0].numel())
        grad_query, grad_value = torch.empty_like(query), value.new_zeros(made.slots, *value.shape)

        def add(piece: Piece, where: Where) -> None:
            for image in range(query.shape[0])[where[0]]:
                g = grad[image, :, where[1]]
                weights = _weights(query[image, :, where[1]], key[image]) if kept is None else kept[image, where[1]]
                grad_value[piece.slot, image].addmm_(g, weights)
                of_scores = g.mT @ value[image]
                of_scores.sub_((g * y[image, :, where[1]]).sum(0)[:, None]).mul_(weights)
                grad_query[image, :, where[1]] = key[image] @ of_scores.mT

        run(made, add)
        return grad_query, None, grad_value.sum(0)


def _weights(query: Tensor, key: Tensor, to: Tensor | None = None) -> Tensor:
    """Softmax weights [n, M] of queries [C, n], written into `to` if given."""
    scores = torch.mm(query.to(key.dtype).mT, key, out=to)
    torch.softmax(scores, -1, out=scores)
    return scores


def _cut(query: Tensor, key: Tensor, kept: int = 0) -> Cut:
    """Blocks of (images, queries), whose weights take no more memory than the queries of an image."""
    batch, channels, queries = query.shape
    at_most = BLOCK_CPU * key.shape[2] // (channels * queries)
    return cut(query.device, batch, queries, max(at_most, min(key.shape[2], BLOCK_CPU // QUERIES)), kept)
