"""Similarity of two maps, without any learned part: diagnostics only."""

import torch
from torch import Tensor

from cankd_hf.features.grids import resize_map


@torch.no_grad()
def channel_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Mean over channels of the Pearson correlation over positions, `[B]` float32 in -1..1.

    Takes `[B, C, H, W]` and `[B, C, h, w]`; the larger map is resized to the smaller one's grid, and constant channels
    count as 0. Raises ValueError if batch sizes or channels differ.
    """
    if a.shape[:2] != b.shape[:2]:
        raise ValueError(f"correlation needs equal batch and channels, got {list(a.shape)} and {list(b.shape)}")
    x, y = (_centred(m) for m in _one_grid(a, b))
    products = (x * y).sum(-1)
    norms = x.square().sum(-1) * y.square().sum(-1)
    return (products * norms.clamp_min(torch.finfo(norms.dtype).tiny).rsqrt()).mean(1)


@torch.no_grad()
def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear CKA (Kornblith et al. 2019) of each image's positions, `[B]` float32 in 0..1 (0 where a map is constant).

    Takes `[B, C, H, W]` and `[B, D, h, w]`; the larger map is resized to the smaller one's grid. With fewer positions
    than channels the (biased) estimate is high even for unrelated maps: compare it with its value at the start of a
    run. Raises ValueError if batch sizes differ.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"expected maps of equal batch, got {list(a.shape)} and {list(b.shape)}")
    x, y = (_unit(_centred(m)) for m in _one_grid(a, b))
    positions = x.shape[-1]
    if positions <= max(x.shape[1], y.shape[1]):  # <XX', YY'> from the smaller Gram matrices
        gram_x, gram_y = x.transpose(1, 2) @ x, y.transpose(1, 2) @ y
        cross, norms = (gram_x * gram_y).sum((1, 2)), _frobenius(gram_x) * _frobenius(gram_y)
    else:
        cross = (x @ y.transpose(1, 2)).square().sum((1, 2))
        norms = _frobenius(x @ x.transpose(1, 2)) * _frobenius(y @ y.transpose(1, 2))
    return cross / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _one_grid(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.detach().float(), b.detach().float()
    smaller = a if a.shape[-2] * a.shape[-1] <= b.shape[-2] * b.shape[-1] else b
    size = (smaller.shape[-2], smaller.shape[-1])
    return resize_map(a, size), resize_map(b, size)


def _centred(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H * W], each channel with zero mean."""
    flat = x.flatten(2)
    return flat - flat.mean(-1, keepdim=True)


def _unit(x: Tensor) -> Tensor:
    """One scale per image, so that fourth powers of large activations do not overflow."""
    return x / _frobenius(x).clamp_min(torch.finfo(x.dtype).tiny)[:, None, None]


def _frobenius(x: Tensor) -> Tensor:
    return x.square().sum((1, 2)).sqrt()
