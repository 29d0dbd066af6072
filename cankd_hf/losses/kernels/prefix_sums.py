"""Reading with the concatenation affinity in O((N + M) log M): sort the keys, then every query reads a prefix.

`y_i = sum_j relu(a_i + b_j) v_j / M`. With b sorted downwards, query i reads exactly the first k_i keys, those with
b_j > -a_i, so `y_i = (a_i V_k + W_k) / M` with the prefix sums V of v_j and W of b_j v_j. The backward pass is the
same seen from the keys: key j is read by the queries with k_i > j, so its gradient is a suffix sum over k.

Letters: B batch, D hidden channels, N queries, M keys.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses.base import differentiable_once
from cankd_hf.losses.kernels.blocks import cut


def relu_read(a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    """`y_i = sum_j relu(a_i + b_j) v_j / M`, differentiable once.

    a [B, N] and b [B, M] are the parts of the affinity from queries and keys, value is [B, M, D], y [B, N, D].
    """
    result: Tensor = _ReluRead.apply(a, b, value)
    return result


class _ReluRead(torch.autograd.Function):
    """Saves its inputs, the order of the keys and how many keys each query reads."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, value: Tensor) -> Tensor:
        falling, order = b.sort(dim=1, descending=True, stable=True)
        # -falling rises; the number of its entries below a_i is the number of keys with b_j > -a_i
        reads = torch.searchsorted(-falling, a.contiguous())
        sums, weighted = _prefix_sums(falling, _rows(value, order))
        y = value.new_empty(*a.shape, value.shape[2])
        for where, rows in _row_blocks(reads, sums):
            y[where] = _take(weighted, rows).addcmul_(a[where][..., None], _take(sums, rows))
        ctx.save_for_backward(a, falling, order, value, reads)
        return y.div_(value.shape[1])

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, falling, order, value, reads = ctx.saved_tensors
        keys = value.shape[1]
        ordered = _rows(value, order)
        sums, _ = _prefix_sums(falling, ordered)
        grad = grad.contiguous()
        grad_a = torch.empty_like(a)
        for where, rows in _row_blocks(reads, sums):
            grad_a[where] = torch.linalg.vecdot(grad[where], _take(sums, rows))
        readers, weighted = _reader_sums(a, grad, reads, keys)
        grad_value = weighted.addcmul_(falling[..., None], readers)
        grad_b = torch.linalg.vecdot(ordered, readers)
        back = order.argsort(dim=1)
        return grad_a / keys, grad_b.gather(1, back) / keys, _rows(grad_value, back) / keys


def _row_blocks(reads: Tensor, sums: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Blocks of queries as (images, queries), and the row of sums [B, M + 1, D] each of them reads."""
    rows = _row_of(reads, sums.shape[1])
    for piece in cut(reads.device, reads.shape[0], reads.shape[1], sums.shape[2]).pieces:
        for where in piece.blocks:
            yield where, rows[where]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows x [B, M, D] in the order index [B, M]."""
    return _take(x, _row_of(index, x.shape[1]))


def _row_of(index: Tensor, length: int) -> Tensor:
    """Indices [B, N] into `length` rows of each image as indices into the rows of all images."""
    return index + length * torch.arange(index.shape[0], device=index.device)[:, None]


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, N] of x [B, M, D] flattened over images, [B, N, D]."""
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, x.shape[2])


def _prefix_sums(falling: Tensor, ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the first k values and of the first k weighted values, k from 0 to M: [B, M + 1, D] each."""
    zero = (0, 0, 1, 0)
    return (F.pad(ordered.cumsum(1), zero), F.pad((falling[..., None] * ordered).cumsum(1), zero))


def _reader_sums(a: Tensor, grad: Tensor, reads: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """For each key j the sums of grad_i and of a_i grad_i over its readers, the queries with k_i > j: [B, M, D]."""
    batch, queries, width = grad.shape
    # queries in the order of k, cut into bags of equal k
    ordered, order = reads.sort(dim=1)
    bags = torch.arange(keys + 1, device=a.device).expand(batch, -1).contiguous()
    offsets = _row_of(torch.searchsorted(ordered, bags), queries).flatten()
    rows = _row_of(order, queries).flatten()

    def suffix_sums(weights: Tensor | None) -> Tensor:
        bag = F.embedding_bag(rows, grad.flatten(0, 1), offsets, mode="sum", per_sample_weights=weights)
        return bag.view(batch, keys + 1, width)[:, 1:].flip(1).cumsum(1).flip(1)

    return suffix_sums(None), suffix_sums(a.gather(1, order).flatten())
