"""The affinities of the Can block, none with an [N, M] tensor.

Each returns the block's output before its norm as `o = mix x + bias`: mix [B, C, K], bias [B, C] and x [B, K, N]
(None where x is the student map itself).

Letters: B batch, C channels, D hidden channels, N student positions (queries), M pooled teacher positions (keys).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cankd_hf.losses.base import compute_dtype

if TYPE_CHECKING:
    from cankd_hf.losses.cankd import CanKDLoss

AFFINITIES = ("dot_product", "embedded_gaussian", "gaussian", "concatenation")

Block = tuple[Tensor, Tensor, Tensor | None]

logger = logging.getLogger(__name__)


def can_pool(x: Tensor) -> bool:
    """Whether a map [B, C, H, W] can be pooled 2x2; said where it cannot."""
    if min(x.shape[2:]) > 1:
        return True
    logger.warning(
        "CanKD: a map of %s cannot be pooled 2x2; keys and values are not sub-sampled there", tuple(x.shape[2:])
    )
    return False


def _weights(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight as a matrix and bias of a 1x1 convolution, in the type to compute in."""
    assert conv.bias is not None
    return conv.weight.flatten(1).to(dtype), conv.bias.to(dtype)


def _project(x: Tensor, conv: nn.Conv2d, dtype: torch.dtype, pool: bool) -> Tensor:
    weight, bias = _weights(conv, dtype)
    y = F.conv2d(x.to(dtype), weight[..., None, None], bias)
    return (F.max_pool2d(y, 2) if pool else y).flatten(2)


def dot_product(loss: CanKDLoss, student: Tensor, teacher: Tensor, pool: bool) -> Block:
    """`f_ij = <q_i, k_j> / M`, re-associated: the whole block is one [C, C] channel mix for each image."""
    assert loss.theta is not None and loss.phi is not None
    dtype = compute_dtype(student)
    theta, theta_bias = _weights(loss.theta, dtype)
    w, w_bias = _weights(loss.w, dtype)
    key, value = _project(teacher, loss.phi, dtype, pool), _project(teacher, loss.g, dtype, pool)
    read = w @ (value @ key.mT / key.shape[-1])  # [B, C, D]
    return read @ theta, read @ theta_bias + w_bias, None
