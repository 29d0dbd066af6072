"""The losses of depth against the equations, written out pixel by pixel in float64; and what they must not see."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cankd_hf.models.fpn.depth_losses_cankd_fpn import LOSSES, depth_loss


def known(predicted: np.ndarray, depth: np.ndarray) -> tuple[list[float], list[float]]:
    """The pixels of one image that have a depth."""
    pairs = [(p, d) for p, d in zip(predicted.ravel(), depth.ravel(), strict=True) if d > 0 and math.isfinite(d)]
    return [p for p, _ in pairs], [d for _, d in pairs]


def naive_silog(p: list[float], d: list[float]) -> float:
    """Eigen et al. 2014, equation (4)."""
    apart = [math.log(a) - math.log(b) for a, b in zip(p, d, strict=True)]
    n = len(apart)
    return sum(a * a for a in apart) / n - 0.5 / n**2 * sum(apart) ** 2


def naive_log_l1(p: list[float], d: list[float]) -> float:
    return sum(abs(math.log(a) - math.log(b)) for a, b in zip(p, d, strict=True)) / len(p)


def naive_ssi(p: list[float], d: list[float]) -> float:
    """Ranftl et al. 2020, equations (1) to (4), solved by numpy; the target has the standard deviation 1."""
    target = 1 / np.array(d)
    target = (target - target.mean()) / target.std()
    matrix = np.stack([np.array(p), np.ones(len(p))], 1)
    fitted = matrix @ np.linalg.lstsq(matrix, target, rcond=None)[0]
    return float(((fitted - target) ** 2).sum() / (2 * len(p)))


def naive_ssi_mad(p: list[float], d: list[float]) -> float:
    """Equations (5) and (6); of an even number of pixels the lower median, as torch has it."""

    def robust(values: list[float]) -> list[float]:
        middle = sorted(values)[(len(values) - 1) // 2]
        scale = sum(abs(value - middle) for value in values) / len(values)
        return [(value - middle) / scale for value in values]

    pairs = zip(robust(p), robust([1 / one for one in d]), strict=True)
    return sum(abs(a - b) for a, b in pairs) / (2 * len(p))


NAIVE: dict[str, Callable[[list[float], list[float]], float]] = {
    "silog": naive_silog,
    "log_l1": naive_log_l1,
    "ssi": naive_ssi,
    "ssi_mad": naive_ssi_mad,
}


def scene() -> tuple[Tensor, Tensor]:
    """Predictions and depths of three images; pixels without a depth in each, the last has none at all."""
    generator = torch.Generator().manual_seed(3)
    predicted = torch.rand(3, 7, 9, generator=generator) * 4 + 0.2
    depth = torch.rand(3, 7, 9, generator=generator) * 8 + 0.5
    depth[0, :2], depth[1, 3, 4], depth[1, 0, 0], depth[2] = 0, torch.nan, torch.inf, 0
    return predicted, depth


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_equation(name: str) -> None:
    predicted, depth = scene()
    values = [
        NAIVE[name](*known(p, d)) for p, d in zip(*(x[:2].double().numpy() for x in (predicted, depth)), strict=True)
    ]
    assert float(depth_loss(name, predicted, depth)) == pytest.approx(np.mean(values), rel=2e-5)
    double = LOSSES[name](predicted.double(), depth.double())
    assert float(double) == pytest.approx(np.mean(values), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_pixels_without_a_depth_count_for_nothing(name: str) -> None:
    predicted, depth = scene()
    predicted.requires_grad_()
    depth_loss(name, predicted, depth).backward()
    without = ~((depth > 0) & torch.isfinite(depth))
    assert predicted.grad is not None and torch.isfinite(predicted.grad).all()
    assert (predicted.grad[without] == 0).all() and (predicted.grad[:2] != 0).any()
    nothing = depth_loss(name, predicted, torch.zeros_like(depth))
    nothing.backward()
    assert nothing == 0 and torch.isfinite(predicted.grad).all()


@pytest.mark.parametrize("name", ["ssi", "ssi_mad"])
def test_relative_depth_knows_neither_scale_nor_shift(name: str) -> None:
    predicted, depth = scene()
    predicted, depth = predicted[:2].double(), depth[:2].double()
    loss = LOSSES[name](predicted, depth)
    torch.testing.assert_close(LOSSES[name](37 * predicted + 5, depth), loss)
    torch.testing.assert_close(LOSSES[name](predicted, depth / 9), loss)  # another unit
    exact = torch.where(depth > 0, 3 / depth.clamp(min=0.1) + 2, 1.0)
    assert LOSSES[name](exact, depth).item() == pytest.approx(0, abs=1e-12)


def test_a_constant_prediction_is_finite() -> None:
    _, depth = scene()
    flat = torch.full_like(depth, 2.0, requires_grad=True)
    for name in LOSSES:
        loss = depth_loss(name, flat, depth)
        loss.backward()
        assert torch.isfinite(loss) and flat.grad is not None and torch.isfinite(flat.grad).all(), name


def test_predictions_come_to_the_size_of_the_depth() -> None:
    predicted, depth = torch.full((2, 4, 4), 3.0), torch.full((2, 9, 5), 3.0)
    assert depth_loss("log_l1", predicted, depth) == pytest.approx(0, abs=1e-6)
