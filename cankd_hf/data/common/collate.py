"""Stacking tensors of several sizes."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def stack_padded(tensors: list[torch.Tensor], fill: float, multiple: int = 1) -> torch.Tensor:
    """Stack [..., h, w] tensors, padded at the right and the bottom to the largest, rounded up to a multiple."""
    height, width = (-(-max(tensor.shape[side] for tensor in tensors) // multiple) * multiple for side in (-2, -1))
    return torch.stack(
        [
            tensor
            if tensor.shape[-2:] == (height, width)
            else pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]), value=fill)
            for tensor in tensors
        ]
    )
