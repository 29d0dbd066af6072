"""CanKD as published, written from the equations: what the benchmark compares with and the tests check against.

It keeps the [N, M] affinity and every map between the steps. Letters: B batch, C channels, D hidden channels,
N student positions, M pooled teacher positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.losses import CanKDLoss


def naive_transform(loss: CanKDLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """z [B, C, H, W] with the parameters of `loss`; in train mode updates its running statistics."""
    pool = loss.subsample and min(teacher.shape[2:]) > 1

    def keys(x: Tensor) -> Tensor:
        return (F.max_pool2d(x, 2) if pool else x).flatten(2)

    value = keys(loss.g(teacher))  # [B, D, M]
    affinity = _naive_affinity(loss, student, teacher, keys)  # [B, N, M]
    read = affinity @ value.mT  # [B, N, D]
    output = loss.w(read.mT.unflatten(2, student.shape[2:]))
    if loss.output_norm is not None:
        output = loss.output_norm(output)
    return output + student if loss.residual else output


def naive_loss(loss: CanKDLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """The published loss [] of two maps [B, C, H, W], with the parameters of `loss`."""
    z, t = naive_transform(loss, student, teacher), teacher
    if loss.normalization == "instance":
        z, t = F.instance_norm(z), F.instance_norm(t)
    return 0.5 * F.mse_loss(z, t)


def affinity_bytes(batch: int, height: int, width: int, subsample: bool, copies: int, itemsize: int = 4) -> int:
    """Bytes of `copies` affinities [B, N, M] of a map of this size."""
    keys = (height // 2) * (width // 2) if subsample else height * width
    return batch * height * width * keys * itemsize * copies


def _naive_affinity(loss: CanKDLoss, student: Tensor, teacher: Tensor, keys) -> Tensor:  # type: ignore[no-untyped-def]
    if loss.theta is None or loss.phi is None:
        return (student.flatten(2).mT @ keys(teacher)).softmax(dim=-1)
    query, key = loss.theta(student).flatten(2), keys(loss.phi(teacher))  # [B, D, N], [B, D, M]
    count = key.shape[2]
    if loss.concat is not None:
        pairs = torch.cat(
            [query[..., None].expand(-1, -1, -1, count), key[:, :, None].expand(-1, -1, query.shape[2], -1)], dim=1
        )
        return F.relu(loss.concat(pairs))[:, 0] / count
    scores = query.mT @ key
    return scores.softmax(dim=-1) if loss.affinity == "embedded_gaussian" else scores / count
