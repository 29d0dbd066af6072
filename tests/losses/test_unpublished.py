"""Options of CanKD that are ours and not the paper's, and the static control: the fast form against the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.losses import CanKDLoss, StaticLinearLoss
from cankd_hf.losses.affinities import AFFINITIES


def trained(loss: CanKDLoss) -> CanKDLoss:
    for parameter in loss.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return loss


def check(loss: CanKDLoss, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value, gradients and z of `forward`, in blocks or on whole maps, against `published`."""
    if whole:
        monkeypatch.setattr("cankd_hf.losses.kernels.blocks.BLOCKWISE", frozenset())
    student, teacher = torch.randn(2, 2, 6, 5, 8, dtype=torch.float64)
    inputs = [student.requires_grad_(), *loss.parameters()]
    z, want = loss.published(student, teacher)
    want_grads = torch.autograd.grad(want, inputs)
    got = loss(student, teacher)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(got, inputs), want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * theirs.abs().max().item() + 1e-12)
    torch.testing.assert_close(loss.transform(student, teacher), z)


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.parametrize("subsample", [False, True], ids=["all", "pooled"])
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_values_of_the_student(affinity: str, subsample: bool, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check(trained(CanKDLoss(6, affinity=affinity, subsample=subsample, values="student")), whole, monkeypatch)


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.parametrize("options", [{"gate": 0.3}, {"gate": 100.0}, {"gate": 0.3, "output_norm": "none"}], ids=str)
def test_the_gate(options: dict[str, Any], whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = trained(CanKDLoss(6, **options))
    check(loss, whole, monkeypatch)
    student, teacher = torch.randn(2, 2, 6, 5, 8, dtype=torch.float64)
    free = trained(CanKDLoss(6, output_norm=options.get("output_norm", "batch")))
    free.load_state_dict(loss.state_dict())
    share, unlimited = loss.branch_share(student, teacher).item(), free.branch_share(student, teacher).item()
    assert share == pytest.approx(min(options["gate"], unlimited)) and 0.3 < unlimited < 100


def test_the_branch_fades_and_only_the_distance_is_left() -> None:
    loss, plain = trained(CanKDLoss(6, fade=4)), CanKDLoss(6).double()
    student, teacher = torch.randn(2, 2, 6, 5, 8, dtype=torch.float64)
    shares = []
    for _ in range(6):
        shares.append(loss.branch_share(student, teacher).item())
        last = loss(student, teacher)
    torch.testing.assert_close(torch.tensor(shares[:4]) / shares[0], torch.tensor([1.0, 0.75, 0.5, 0.25]))
    assert shares[4:] == [0.0, 0.0] and loss.passes == 6
    torch.testing.assert_close(last, plain(student, teacher))  # of a new block, whose branch is 0
    resumed = CanKDLoss(6, fade=4).double()
    resumed.load_state_dict(loss.state_dict())
    assert resumed.branch_share(student, teacher) == 0
    assert torch.equal(loss.eval()(student, teacher), loss(student, teacher)) and loss.passes == 6


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
@pytest.mark.parametrize("output_norm", ["batch", "none"])
def test_the_static_control(output_norm: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = trained(StaticLinearLoss(6, output_norm=output_norm))
    check(loss, whole, monkeypatch)
    student, teacher, other = torch.randn(3, 2, 6, 5, 8, dtype=torch.float64)
    assert torch.equal(loss.transform(student, teacher), loss.transform(student, other))
    assert {name.partition(".")[0] for name, _ in loss.named_parameters()} == (
        {"theta", "w", "output_norm"} if output_norm == "batch" else {"theta", "w"}
    )


def test_where_the_teachers_positions_are_does_not_matter_to_the_published_block() -> None:
    """With values of the teacher and the dot product; with those of the student each cell reads its own neighbours."""
    student, teacher = torch.randn(2, 2, 6, 5, 8, dtype=torch.float64)
    shuffled = teacher.flatten(2)[..., torch.randperm(40)].view_as(teacher)

    def moved(values: str) -> Tensor:
        loss = trained(CanKDLoss(6, subsample=False, values=values))
        return (loss.transform(student, teacher) - loss.transform(student, shuffled)).abs().max()

    assert moved("teacher") < 1e-10 < 1e-2 < moved("student")


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match="CanKDLoss.values: expected one of teacher, student, got 'both'"):
        CanKDLoss(6, values="both")
    with pytest.raises(InputError, match="CanKDLoss.gate: expected a number above 0, got 0"):
        CanKDLoss(6, gate=0)
    with pytest.raises(InputError, match="CanKDLoss.fade: expected a number of at least 0, got -1"):
        CanKDLoss(6, fade=-1)
