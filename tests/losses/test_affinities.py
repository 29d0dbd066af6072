"""An affinity of one's own: a class and a line in `AFFINITIES`, nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cankd_hf.benchmark import main
from cankd_hf.losses import CanKDLoss, attention_map
from cankd_hf.losses.affinities import AFFINITIES, Affinity, Block, Projections
from cankd_hf.losses.affinities.base import keys_and_values, output_block, softmax_read


class ScaledDotProduct(Affinity):
    """`softmax_j (<q_i, k_j> * e^r / sqrt(D))` with a learned r."""

    value_range = "softmax"

    def extra(self, hidden_channels: int) -> nn.Conv2d:
        return nn.Conv2d(1, 1, 1, bias=False)

    def published(self, p: Projections, query: Tensor, key: Tensor) -> Tensor:
        assert p.extra is not None
        return (query.mT @ key * p.extra.exp() / math.sqrt(query.shape[1])).softmax(-1)

    def block(self, p: Projections, student: Tensor, teacher: Tensor, pool: bool) -> Block:
        assert p.theta is not None and p.extra is not None
        key, value = keys_and_values(p, teacher, pool)
        query = p.theta.flat(student.to(key.dtype)) * p.extra.exp() / math.sqrt(key.shape[1])
        return output_block(p, softmax_read(query.mT, key.mT, value.mT))


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> CanKDLoss:
    monkeypatch.setitem(AFFINITIES, "scaled", ScaledDotProduct())
    return CanKDLoss(6, affinity="scaled").double()


@pytest.mark.parametrize("train", [True, False])
def test_its_two_forms_agree(scaled: CanKDLoss, train: bool) -> None:
    for parameter in scaled.train(train).parameters():
        nn.init.normal_(parameter, std=0.5)
    student, teacher = torch.randn(2, 2, 6, 5, 8, dtype=torch.float64)
    inputs = [student.requires_grad_(), *scaled.parameters()]
    z, want = scaled.published(student, teacher)
    want_grads = torch.autograd.grad(want, inputs)
    got = scaled(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), want_grads, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(scaled.transform(student, teacher), z)
    assert attention_map(scaled, student[0], teacher[0], (1, 2)).sum().item() == pytest.approx(1)


def test_it_trains_and_is_saved(scaled: CanKDLoss) -> None:
    before = {name: value.clone() for name, value in scaled.named_parameters()}
    student, teacher = torch.randn(2, 2, 6, 6, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD([student.requires_grad_(), *scaled.parameters()], lr=1.0)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        values.append(scaled(student, teacher))
        values[-1].backward()
        optimizer.step()
    assert values[-1] < values[0]
    assert all(not torch.equal(before[name], scaled.state_dict()[name]) for name in ("concat.weight", "theta.weight"))
    twin = CanKDLoss(6, affinity="scaled").double()
    twin.load_state_dict(scaled.state_dict())
    assert torch.equal(twin.eval()(student, teacher), scaled.eval()(student, teacher))


@pytest.mark.usefixtures("scaled")
def test_it_is_benchmarked_by_name() -> None:
    assert main(["loss", "--quick", "--sizes", "6x10x8", "--affinities", "scaled"]) == 0


def test_every_affinity_is_complete() -> None:
    for affinity in AFFINITIES.values():
        assert affinity.value_range in ("signed", "non-negative", "softmax")
        assert affinity.flops(100, 25, 8, 4) > 0 and affinity.published_copies(4) >= 3
