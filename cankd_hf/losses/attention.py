"""Which teacher positions one student position reads in the Can block: for looking at, not for training.

Letters: C channels, D hidden channels, H and W the size of the maps, h and w after pooling, M = h * w keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cankd_hf.losses.affinity import can_pool, conv_weights
from cankd_hf.losses.base import compute_dtype
from cankd_hf.losses.cankd import CanKDLoss
from cankd_hf.losses.kernels.projection import max_pool, project


@torch.no_grad()
def attention_map(loss: CanKDLoss, student_map: Tensor, teacher_map: Tensor, pixel: tuple[int, int]) -> Tensor:
    """The affinity `f_ij` of one student position i to every key j, as the Can block computes it (paper, figure 5).

    Only the row of one query is formed: memory O(M), not O(N M).

    Args:
        loss: the term's loss; its parameters and options are used, nothing of it changes.
        student_map: student map after the connector, [C, H, W].
        teacher_map: teacher map on the same grid, [C, H, W].
        pixel: row and column of the query, in cells of the maps.

    Returns:
        [h, w], the keys' grid (H // 2, W // 2 where the loss sub-samples): softmax weights that sum to 1 for the two
        Gaussian affinities; `<q_i, k_j> / M` of any sign for the dot product; `relu(...) / M`, at least 0, for the
        concatenation.

    Raises:
        ValueError: the maps do not fit the loss or each other, or the pixel lies outside.
    """
    student, teacher = student_map[None], teacher_map[None]
    loss._check_maps(student, teacher)
    height, width = teacher.shape[2:]
    row, column = pixel
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"attention_map: expected a pixel inside {height} x {width} cells, got {row}, {column}")
    dtype = compute_dtype(student)
    with torch.autocast(device_type=student.device.type, enabled=False):
        pool = loss.subsample and can_pool(teacher)
        grid = (height // 2, width // 2) if pool else (height, width)
        return _row(loss, student[0, :, row, column].to(dtype), teacher.to(dtype), pool).view(grid)


def _row(loss: CanKDLoss, query: Tensor, teacher: Tensor, pool: bool) -> Tensor:
    """`f_ij` [M] of a student position [C] and a teacher map [1, C, H, W]."""
    dtype = query.dtype
    if loss.affinity == "gaussian":
        key = (max_pool(teacher) if pool else teacher.flatten(2))[0]
        return (query @ key).softmax(dim=0)
    theta, theta_bias = conv_weights(loss.theta, dtype)
    key = project(teacher, *conv_weights(loss.phi, dtype), pool)[0]
    query = theta @ query + theta_bias
    if loss.concat is not None:
        for_query, for_key = loss.concat.weight.flatten().to(dtype).chunk(2)
        return (for_query @ query + for_key @ key).relu() / key.shape[1]
    scores = query @ key
    return scores.softmax(dim=0) if loss.affinity == "embedded_gaussian" else scores / key.shape[1]
