"""What every loss in LOSSES promises, and LossTerm."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.losses import LOSSES, DistillationLoss, MaskedGenerativeLoss


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


@pytest.fixture(params=list(LOSSES))
def loss(request: pytest.FixtureRequest) -> DistillationLoss:
    return LOSSES[request.param](8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scalar_in_the_promised_type(loss: DistillationLoss, dtype: torch.dtype) -> None:
    student, teacher = maps(2, 8, 6, 10, dtype=dtype)
    value = loss(student.requires_grad_(), teacher.requires_grad_())
    assert value.shape == () and math.isfinite(value.item())
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    value.backward()
    assert student.grad is not None and student.grad.dtype == dtype and student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_autocast_does_not_reach_it(loss: DistillationLoss) -> None:
    student, teacher = maps(2, 8, 6, 10)
    plain = loss.eval()(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(student, teacher)
    assert inside.dtype == torch.float32 and torch.equal(plain, inside)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_maps_of_two_types(loss: DistillationLoss, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = maps(2, 8, 6, 10)
    torch.manual_seed(1)  # some losses draw a mask
    value = loss(student.to(dtypes[0]).requires_grad_(), teacher.to(dtypes[1]))
    value.backward()
    assert value.dtype == torch.float32
    torch.manual_seed(1)
    torch.testing.assert_close(value, loss(student, teacher), rtol=1e-2, atol=1e-2)


def test_order_of_the_batch_does_not_matter(loss: DistillationLoss) -> None:
    student, teacher = maps(3, 8, 5, 7)
    if isinstance(loss, MaskedGenerativeLoss):
        loss.eval()  # in training each image has a mask of its own
    torch.testing.assert_close(loss(student, teacher), loss(student.flip(0), teacher.flip(0)))


def test_wrong_shapes_name_both(loss: DistillationLoss) -> None:
    with pytest.raises(ValueError, match=r"\[2, 8, 6, 10\].*\[2, 8, 6, 9\]"):
        loss(torch.randn(2, 8, 6, 10), torch.randn(2, 8, 6, 9))
    unit = "channels" if loss.reads == "maps" else "classes"
    with pytest.raises(ValueError, match=rf"8 {unit}.*\[2, 4, 6, 6\]"):
        loss(*maps(2, 4, 6, 6))


def test_parameters_move_in_three_steps(loss: DistillationLoss) -> None:
    before = {name: value.clone() for name, value in loss.named_parameters()}
    student, teacher = maps(2, 8, 6, 10)
    optimizer = torch.optim.SGD([student.requires_grad_(), *loss.parameters()], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(student, teacher)
        (value / value.detach()).backward()  # published factors make some losses tiny
        optimizer.step()
    # biases before the output norm and of it are normalised away
    still = {"w.bias", "output_norm.bias"}
    assert all(not torch.equal(before[name], value) for name, value in loss.named_parameters() if name not in still)


@pytest.mark.parametrize("name", LOSSES)
def test_differentiable_as_often_as_it_says(name: str) -> None:
    once = "differentiable once" in (LOSSES[name].__doc__ or "").lower()
    assert once or name not in ("cankd", "instance_mse")
    student, teacher = maps(1, 8, 4, 4)
    (grad,) = torch.autograd.grad(LOSSES[name](8)(student.requires_grad_(), teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable") if once else nullcontext():
        grad.square().sum().backward()


def test_size_must_be_positive() -> None:
    for build in LOSSES.values():
        with pytest.raises(InputError, match="channels" if build.reads == "maps" else "num_labels"):
            build(0)


def test_term_schedule() -> None:
    term = LossTerm(warmup=0.1, decay=20)
    assert [term.factor(step, 100) for step in (0, 5, 10, 80, 90, 100)] == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert LossTerm().factor(0, 100) == LossTerm().factor(100, 100) == 1.0


def test_term_weights() -> None:
    assert LossTerm().weights(3) == [10.0, 10.0, 10.0]
    assert LossTerm(weight=[1, 2.0]).weights(2) == [1.0, 2.0]
    with pytest.raises(InputError, match="expected 3 weights"):
        LossTerm(weight=[1.0, 2.0]).weights(3)


def test_term_check_says_everything_at_once() -> None:
    LossTerm(weight=[0, 5.0], pairs=[[0, 1], [1, 2]], warmup=100).check()
    with pytest.raises(InputError) as caught:
        LossTerm(loss="cnakd", weight=-1, pairs=[[0]], warmup=-0.5, decay=float("nan")).check()
    assert len(caught.value.problems) == 5
