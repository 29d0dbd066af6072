"""The affinities of the Can block, none with an [N, M] tensor.

Each takes the student map flattened, [B, C, N], and the teacher map [B, C, H, W], and returns the block's output
before its norm as `o = mix x + bias`: mix [B, C, K], bias [B, C] and x [B, K, N] (None where x is the student map).

Letters: B batch, C channels, D hidden channels, N student positions (queries), M pooled teacher positions (keys).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.losses.base import compute_dtype
from cankd_hf.losses.kernels.prefix_sums import relu_read
from cankd_hf.losses.kernels.projection import covariance, max_pool, project

if TYPE_CHECKING:
    from cankd_hf.losses.cankd import CanKDLoss

Block = tuple[Tensor, Tensor, Tensor | None]

logger = logging.getLogger(__name__)
_said: set[tuple[int, ...]] = set()


def can_pool(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] can be pooled 2x2; a size that cannot is said once."""
    size = tuple(x.shape[2:])
    if min(size) > 1:
        return True
    if size not in _said and not torch.compiler.is_compiling():
        _said.add(size)
        logger.warning("CanKD: a map of size %s cannot be pooled 2x2: its keys and values are not sub-sampled", size)
    return False


def dot_product(loss: CanKDLoss, student: Tensor, teacher: Tensor, pool: bool) -> Block:
    """`f_ij = <q_i, k_j> / M`, re-associated: the whole block is one [C, C] channel mix for each image."""
    dtype = compute_dtype(student)
    theta, theta_bias = conv_weights(loss.theta, dtype)
    w, w_bias = conv_weights(loss.w, dtype)
    read = w @ _value_times_key(loss, teacher, dtype, pool)  # [B, C, D]
    return read @ theta, read @ theta_bias + w_bias, None


def _value_times_key(loss: CanKDLoss, teacher: Tensor, dtype: torch.dtype, pool: bool) -> Tensor:
    """`value key^T / M`, [B, D, D]."""
    if pool:
        key, value = _keys_and_values(loss, teacher, dtype, pool)
        return value @ key.mT / key.shape[2]
    # without the pool both are linear in the teacher map, so that its covariance says it all
    mean, cov = covariance(teacher, dtype)
    (phi, phi_bias), (g, g_bias) = conv_weights(loss.phi, dtype), conv_weights(loss.g, dtype)
    mean_key, mean_value = F.linear(mean, phi, phi_bias), F.linear(mean, g, g_bias)
    return g @ cov @ phi.T + mean_value[:, :, None] * mean_key[:, None, :]


def embedded_gaussian(loss: CanKDLoss, student: Tensor, teacher: Tensor, pool: bool) -> Block:
    """`softmax_j <q_i, k_j>`, unscaled."""
    dtype = compute_dtype(student)
    theta, theta_bias = conv_weights(loss.theta, dtype)
    key, value = _keys_and_values(loss, teacher, dtype, pool)
    query = _times(theta, student.to(dtype), theta_bias)
    return _read_out(loss, _softmax_read(query.mT, key.mT, value.mT), dtype)


def gaussian(loss: CanKDLoss, student: Tensor, teacher: Tensor, pool: bool) -> Block:
    """`softmax_j <s_i, t_j>` on the raw channels; the keys are the pooled teacher map."""
    dtype = compute_dtype(student)
    key = (max_pool(teacher) if pool else teacher.flatten(2)).to(dtype)
    value = project(teacher, *conv_weights(loss.g, dtype), pool)
    return _read_out(loss, _softmax_read(student.mT.to(dtype), key.mT, value.mT), dtype)


def concatenation(loss: CanKDLoss, student: Tensor, teacher: Tensor, pool: bool) -> Block:
    """`relu(a . q_i + b . k_j) / M`: one number a query and one a key."""
    assert loss.concat is not None
    dtype = compute_dtype(student)
    theta, theta_bias = conv_weights(loss.theta, dtype)
    for_query, for_key = loss.concat.weight.flatten().to(dtype).chunk(2)
    key, value = _keys_and_values(loss, teacher, dtype, pool)
    a = _times((for_query @ theta)[None], student.to(dtype), (for_query @ theta_bias)[None])
    b = _times(for_key[None], key, for_key.new_zeros(1))
    return _read_out(loss, relu_read(a[:, 0], b[:, 0], value.mT), dtype)


def conv_weights(conv: nn.Conv2d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight as a matrix and bias of a 1x1 convolution, in the type to compute in."""
    assert conv is not None and conv.bias is not None
    return conv.weight.flatten(1).to(dtype), conv.bias.to(dtype)


def _times(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """`weight x + bias` for a map [B, C, N]; torch's matmul of a matrix and a batch copies the whole map first."""
    return torch.baddbmm(bias[:, None], weight.expand(x.shape[0], -1, -1), x)


def _keys_and_values(loss: CanKDLoss, teacher: Tensor, dtype: torch.dtype, pool: bool) -> tuple[Tensor, Tensor]:
    """Both projections [B, D, M] in one pass over the teacher map."""
    (phi, phi_bias), (g, g_bias) = conv_weights(loss.phi, dtype), conv_weights(loss.g, dtype)
    both = project(teacher, torch.cat([phi, g]), torch.cat([phi_bias, g_bias]), pool)
    key, value = both.chunk(2, dim=1)
    return key, value


def _softmax_read(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`softmax(query key^T) value`, [B, N, D], blockwise.

    The blockwise kernels want equal widths of query and value, and some a multiple of 8: padded with zeros.
    """
    hidden = value.shape[2]
    width = -(-max(query.shape[2], hidden) // 8) * 8
    query, key, value = (F.pad(x, (0, width - x.shape[2]))[:, None].contiguous() for x in (query, key, value))
    read = F.scaled_dot_product_attention(query, key, value, scale=1.0)
    return read[:, 0, :, :hidden]


def _read_out(loss: CanKDLoss, read: Tensor, dtype: torch.dtype) -> Block:
    w, w_bias = conv_weights(loss.w, dtype)
    return w.expand(read.shape[0], -1, -1), w_bias.expand(read.shape[0], -1), read.mT


AFFINITIES: dict[str, Callable[[CanKDLoss, Tensor, Tensor, bool], Block]] = {
    "dot_product": dot_product,
    "embedded_gaussian": embedded_gaussian,
    "gaussian": gaussian,
    "concatenation": concatenation,
}
