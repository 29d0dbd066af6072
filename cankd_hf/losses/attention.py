"""The teacher positions that a student position attends to in the Can block, for visualisation.

Letters: C channels, H and W the size of the maps, h and w after pooling.
"""

import torch
from torch import Tensor

from cankd_hf.losses.base import compute_dtype
from cankd_hf.losses.cankd import CanKDLoss


@torch.no_grad()
def attention_map(loss: CanKDLoss, student_map: Tensor, teacher_map: Tensor, pixel: tuple[int, int]) -> Tensor:
    """The affinity `f_ij` of one student position i to every key j, as the Can block computes it (paper, figure 5).

    Only the row of one query is formed: memory grows with the map, not with its square.

    Args:
        loss: the loss of a term; it is not modified.
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
    loss.check(student, teacher)
    height, width = teacher.shape[2:]
    row, column = pixel
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"attention_map: expected a pixel inside {height} x {width} cells, got {row}, {column}")
    dtype = compute_dtype(student)
    with torch.autocast(device_type=student.device.type, enabled=False):
        query = student[:, :, row : row + 1, column : column + 1].to(dtype)
        affinity = loss.affinity_matrix(query, teacher.to(dtype))
    return affinity.view((height // 2, width // 2) if loss.pools(teacher) else (height, width))
