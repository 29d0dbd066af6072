"""Losses of predicted depth, for any model that predicts it.

This file travels with every saved depth student (`trust_remote_code=True`), so it imports nothing of `cankd_hf`.
Letters in shapes: B images, H and W of the depth maps. Depths are in metres; 0 and what is not finite has none.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 1e-3  # metres: below it the logarithm goes on as a straight line, finite and with a gradient
VARIANCE_FOCUS = 0.5  # the lambda of Eigen et al. 2014
TINY = 1e-6


def known(depth: Tensor) -> Tensor:
    """Which pixels have a depth, bool."""
    return (depth > 0) & torch.isfinite(depth)


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of each map [B, H, W] over its valid pixels, [B]; 0 where there are none."""
    return values.where(valid, 0).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def over_images(values: Tensor, valid: Tensor) -> Tensor:
    """The mean of [B] over the images that have a valid pixel, []; 0 where none has."""
    counted = valid.flatten(1).any(1)
    return values.where(counted, 0).sum() / counted.sum().clamp(min=1)


def log_difference(predicted: Tensor, depth: Tensor, valid: Tensor) -> Tensor:
    """The difference of the logarithms, [B, H, W]; 0 where there is no depth."""
    logarithm = predicted.clamp(min=LEAST).log() - F.relu(LEAST - predicted) / LEAST
    return logarithm - depth.where(valid, 1).log()


def silog(predicted: Tensor, depth: Tensor) -> Tensor:
    """The scale-invariant error of logarithms, equation (4) of Eigen et al. 2014 (arXiv:1406.2283), [].

    With `d` the difference of the logarithms at the `n` valid pixels of an image, `mean(d^2) - lambda mean(d)^2`, with
    the paper's `lambda` of 0.5; the mean over the images.
    """
    valid = known(depth)
    apart = log_difference(predicted, depth, valid)
    return over_images(mean_over(apart**2, valid) - VARIANCE_FOCUS * mean_over(apart, valid) ** 2, valid)


def log_l1(predicted: Tensor, depth: Tensor) -> Tensor:
    """The mean absolute difference of the logarithms, which is not moved as far by outliers (Carvalho et al. 2018,
    arXiv:1809.00510, compares it with others), []."""
    valid = known(depth)
    return over_images(mean_over(log_difference(predicted, depth, valid).abs(), valid), valid)


def inverse(depth: Tensor, valid: Tensor) -> Tensor:
    """Inverse depth; 0 where there is none."""
    return (1 / depth.where(valid, 1)).where(valid, 0)


def least_squares(predicted: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [B] of each predicted map that bring it nearest to its target, in closed form.

    Equations (3) and (4) of Ranftl et al. 2020 (arXiv:1907.01341). Where a map is constant its scale is 0.
    """
    predicted, weight = predicted.where(valid, 0), valid.to(predicted.dtype)
    count = weight.sum((1, 2)).clamp(min=1)
    mean_p, mean_t = predicted.sum((1, 2)) / count, (target * weight).sum((1, 2)) / count
    # about the means, which loses no digits where values are far from 0
    p = (predicted - mean_p[:, None, None]) * weight
    spread = (p**2).sum((1, 2))
    together = (p * (target - mean_t[:, None, None])).sum((1, 2))
    flat = spread <= TINY**2 * count * mean_p**2 + torch.finfo(spread.dtype).tiny
    scale = (together / spread.where(~flat, 1)).where(~flat, 0)
    return scale, mean_t - scale * mean_p


def ssi(predicted: Tensor, depth: Tensor) -> Tensor:
    """The scale- and shift-invariant loss of inverse depth with a least-squares fit of each image, [].

    Equations (1) to (4) of Ranftl et al. 2020: `1 / (2 M) sum (s p + t - d)^2` over the `M` valid pixels, where `d` is
    the inverse depth, here over its own standard deviation, so that near and far scenes count alike.
    """
    valid = known(depth)
    target = inverse(depth, valid)
    mean = mean_over(target, valid)[:, None, None]
    spread = mean_over((target - mean) ** 2, valid).clamp(min=TINY**2).sqrt()[:, None, None]
    target = (target - mean) / spread
    scale, shift = least_squares(predicted, target, valid)
    apart = scale[:, None, None] * predicted + shift[:, None, None] - target
    return over_images(mean_over(apart**2, valid) / 2, valid)


def robust(values: Tensor, valid: Tensor) -> Tensor:
    """Values of each map, shifted by their median and scaled by their mean distance from it, equations (5) and (6)."""
    median = values.masked_fill(~valid, torch.nan).flatten(1).nanmedian(1).values.nan_to_num()[:, None, None]
    scale = mean_over((values - median).abs(), valid).clamp(min=TINY)[:, None, None]
    return (values - median) / scale


def ssi_mad(predicted: Tensor, depth: Tensor) -> Tensor:
    """The scale- and shift-invariant loss of inverse depth with a robust fit of each image, [].

    Equations (1), (5) and (6) of Ranftl et al. 2020: prediction and inverse depth each have their median subtracted
    and are divided by their mean absolute distance from it; `1 / (2 M) sum |p - d|`.
    """
    valid = known(depth)
    apart = robust(predicted, valid) - robust(inverse(depth, valid), valid)
    return over_images(mean_over(apart.abs(), valid) / 2, valid)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silog": silog,
    "log_l1": log_l1,
    "ssi": ssi,
    "ssi_mad": ssi_mad,
}


def depth_loss(name: str, predicted: Tensor, depth: Tensor) -> Tensor:
    """A loss in float32, at the resolution of the true depth; 0 and not NaN where no pixel has one.

    Args:
        name: of the loss, in `LOSSES`.
        predicted: [B, h, w].
        depth: in metres, [B, H, W].
    """
    predicted, depth = predicted.float(), depth.float()
    if predicted.shape != depth.shape:
        predicted = F.interpolate(predicted[:, None], depth.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return LOSSES[name](predicted, depth)
