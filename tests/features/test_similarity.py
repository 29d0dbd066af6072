"""Similarities against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cankd_hf.features import channel_correlation, linear_cka, resize_map


def test_correlation_is_numpys() -> None:
    a, b = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    expected = [np.mean([np.corrcoef(a[i, c].ravel(), b[i, c].ravel())[0, 1] for c in range(3)]) for i in range(2)]
    assert np.allclose(channel_correlation(a, b).numpy(), expected, atol=1e-6)
    assert torch.allclose(channel_correlation(a, 3 * a - 7), torch.ones(2), atol=1e-6)
    assert torch.allclose(channel_correlation(a, -a), -torch.ones(2), atol=1e-6)
    assert channel_correlation(a, torch.ones_like(a)).tolist() == [0, 0]


@pytest.mark.parametrize(("channels", "grid"), [((3, 5), (8, 9)), ((40, 60), (4, 4)), ((3, 60), (4, 5))])
def test_cka_is_the_definition(channels: tuple[int, int], grid: tuple[int, int]) -> None:
    a, b = (torch.randn(2, c, *grid) for c in channels)
    for i, value in enumerate(linear_cka(a, b)):
        x, y = (m[i].flatten(1).T.double().numpy() for m in (a, b))
        x, y = x - x.mean(0), y - y.mean(0)
        expected = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
        assert float(value) == pytest.approx(expected, rel=1e-4)


def test_cka_does_not_see_scale_or_rotation() -> None:
    a = torch.randn(2, 8, 12, 12)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    turned = 1e4 * torch.einsum("dc,bchw->bdhw", rotation, a)
    assert torch.allclose(linear_cka(a, turned), torch.ones(2), atol=1e-5)
    assert linear_cka(a, torch.zeros(2, 3, 12, 12)).tolist() == [0, 0]


def test_grids_precision_and_gradient() -> None:
    a = torch.randn(2, 4, 12, 10, requires_grad=True)
    small = resize_map(a.detach(), (6, 5))
    for measure in (channel_correlation, linear_cka):
        value = measure(a.bfloat16(), small.bfloat16())
        assert value.dtype == torch.float32 and not value.requires_grad
        assert (value > 0.99).all()
    with pytest.raises(ValueError, match=r"\[2, 4, 12, 10\] and \[2, 3, 6, 5\]"):
        channel_correlation(a, small[:, :3])
