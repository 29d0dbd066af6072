"""gradcheck on every hand-written backward pass, whole and in blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from cankd_hf.losses.kernels import blocks
from cankd_hf.losses.kernels.moments import mix_moments, pair_moments
from cankd_hf.losses.kernels.prefix_sums import relu_read
from cankd_hf.losses.kernels.projection import covariance, max_pool, project


@pytest.fixture(autouse=True, params=[1 << 18, 20], ids=["whole", "blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CPU", request.param)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_pair_moments() -> None:
    teacher = draw(2, 3, 7).detach()
    assert gradcheck(lambda s: pair_moments(s, teacher)[:1] + pair_moments(s, teacher)[2:3], draw(2, 3, 7))
    assert gradcheck(lambda s: pair_moments(s, teacher).cov_st, draw(2, 3, 7))


def test_mix_moments_of_the_student() -> None:
    teacher = draw(2, 3, 7).detach()
    assert gradcheck(lambda s, mix: differentiable(mix_moments(s, teacher, mix)), (draw(2, 3, 7), draw(2, 3, 3)))


def test_mix_moments_of_another_map() -> None:
    teacher = draw(2, 3, 7).detach()
    inputs = draw(2, 3, 7), draw(2, 3, 4), draw(2, 4, 7)
    assert gradcheck(lambda s, mix, x: differentiable(mix_moments(s, teacher, mix, x)), inputs)


def differentiable(moments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value for value in moments if value.requires_grad)


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_projection(pool: bool, size: tuple[int, int]) -> None:
    teacher = draw(2, 3, *size).detach()
    assert gradcheck(lambda weight, bias: project(teacher, weight, bias, pool), (draw(4, 3), draw(4)))


def test_projection_equals_convolution_and_pool() -> None:
    teacher, weight, bias = torch.randn(2, 3, 5, 7), torch.randn(4, 3), torch.randn(4)
    want = torch.nn.functional.conv2d(teacher, weight[..., None, None], bias)
    torch.testing.assert_close(project(teacher, weight, bias, False), want.flatten(2))
    want = torch.nn.functional.max_pool2d(want, 2)
    torch.testing.assert_close(project(teacher, weight, bias, True), want.flatten(2))
    torch.testing.assert_close(max_pool(teacher), torch.nn.functional.max_pool2d(teacher, 2).flatten(2))


def test_covariance() -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    mean, cov = covariance(x, torch.float64)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    torch.testing.assert_close(cov[1], torch.cov(x[1].flatten(1), correction=0))


def test_relu_read() -> None:
    assert gradcheck(relu_read, (draw(2, 6), draw(2, 5), draw(2, 5, 3)))


@pytest.mark.parametrize("shift", [-100.0, 100.0, 0.0])
def test_relu_read_at_its_ends(shift: float) -> None:
    """No key read, all keys read, and keys exactly at the threshold, where the derivative of relu is 0."""
    a, b, value = draw(2, 6), draw(2, 5), draw(2, 5, 3)
    with torch.no_grad():
        a += shift
        if shift == 0:
            a.copy_(-b[:, :1].expand_as(a))
    want = torch.relu(a[..., None] + b[:, None]) @ value / 5
    got = relu_read(a, b, value)
    torch.testing.assert_close(got, want)
    pick = torch.randn_like(want)
    inputs = (a, b, value)
    torch.testing.assert_close(
        torch.autograd.grad((got * pick).sum(), inputs), torch.autograd.grad((want * pick).sum(), inputs)
    )


def test_precise_far_from_zero() -> None:
    """float32 maps whose means are large beside their variations keep their variances."""
    s, t = (torch.randn(2, 4, 5000, dtype=torch.float64) for _ in range(2))
    want = pair_moments(s, t)
    got = pair_moments(s.float() + 1000, t.float() + 1000)
    torch.testing.assert_close(got.var_s.double(), want.var_s, rtol=1e-4, atol=0)
    torch.testing.assert_close(got.cov_st.double(), want.cov_st, rtol=0, atol=1e-4)
