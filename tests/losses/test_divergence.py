"""The divergence that several losses share: by blocks on the CPU, equal to that of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from cankd_hf.losses import LOSSES
from cankd_hf.losses.kernels import blocks, divergence
from cankd_hf.losses.kernels.divergence import mean_divergence

SHAPES = [((3, 4, 30), -1), ((3, 5, 4, 6), 1), ((2, 3, 4, 7), -1), ((9, 5), 1)]


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "SMALL", 1)
    monkeypatch.setattr(blocks, "BLOCK_CPU", 40)


def published(student: Tensor, teacher: Tensor, dim: int, temperature: float) -> Tensor:
    ours, theirs = ((x / temperature).log_softmax(dim) for x in (student, teacher))
    each = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return each * student.shape[dim] / student.numel()


def computed(function: object, student: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    value = function(student, *args)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_equals_kl_div(shape: tuple[int, ...], dim: int, temperature: float, by_blocks: None) -> None:
    student, teacher = (3 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    want = computed(published, student, teacher, dim, temperature)
    got = computed(mean_divergence, student, teacher, dim, temperature)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)
    single = computed(mean_divergence, student.float(), teacher.float(), dim, temperature)
    torch.testing.assert_close([x.double() for x in single], list(want), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_differentiable_twice(shape: tuple[int, ...], dim: int, by_blocks: None) -> None:
    student, teacher = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    student = student.requires_grad_()
    assert gradcheck(lambda s: mean_divergence(s, teacher, dim, 2.0), student)
    assert gradgradcheck(lambda s: mean_divergence(s, teacher, dim, 2.0), student)


@pytest.mark.parametrize("offset", [0.0, 5.0])
@pytest.mark.parametrize("scale", [0.1, 10.0, 1000.0])
def test_is_nothing_where_both_are_equal(scale: float, offset: float) -> None:
    teacher = scale * torch.randn(4, 64, 2100, generator=torch.Generator().manual_seed(0))
    assert teacher.numel() >= divergence.SMALL
    value, gradient = computed(mean_divergence, teacher + offset, teacher, -1)
    assert value.abs() <= 1e-7 * (scale + offset) and gradient.abs().max() < 1e-7 * (1 + scale)
    assert offset or (value == 0 and not gradient.any())


def test_small_divergences_are_as_exact_as_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 10 * torch.randn(4, 64, 2100, generator=generator)
    student = teacher + 1e-2 * torch.randn(teacher.shape, generator=generator)
    want = published(student.double(), teacher.double(), -1, 1.0)
    torchs, ours = (f(student, teacher, -1, 1.0).double() - want for f in (published, mean_divergence))
    assert ours.abs() <= max(2 * torchs.abs(), 1e-3 * want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float, by_blocks: None) -> None:
    student, teacher = torch.randn(2, 3, 30), torch.randn(2, 3, 30)
    student[1, 2, 3] = bad
    assert not mean_divergence(student, teacher, -1).isfinite()
    assert not mean_divergence(teacher, student, -1).isfinite()


@pytest.mark.parametrize("name", ["channel_wise", "kl", "patch_similarity"])
def test_losses_are_the_same_by_blocks_on_any_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(2, 8, 6, 10), torch.randn(2, 8, 6, 10)
    usual = computed(LOSSES[name](8), student, teacher)
    monkeypatch.setattr(divergence, "SMALL", 1)
    monkeypatch.setattr(blocks, "BLOCK_CPU", 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = computed(LOSSES[name](8), student, teacher)
            torch.testing.assert_close(got, usual, rtol=1e-5, atol=1e-7)
            again = computed(LOSSES[name](8), student, teacher)
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    finally:
        torch.set_num_threads(before)
