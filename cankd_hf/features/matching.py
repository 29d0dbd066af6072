"""Pairs of the least total cost."""

import torch
from torch import Tensor


@torch.no_grad()
def assign(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Hungarian matching, image by image, on the host, as DETR matches objects.

    Args:
        costs: finite, [B, N, M].

    Returns:
        Places [B, n] of rows and of columns that belong together, n = min(N, M).
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    pairs = [linear_sum_assignment(one) for one in costs.float().cpu().numpy()]
    rows, columns = (torch.stack([torch.as_tensor(pair[side]) for pair in pairs]) for side in (0, 1))
    return rows.to(costs.device), columns.to(costs.device)
