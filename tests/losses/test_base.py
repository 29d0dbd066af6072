"""What a loss gets from its base class: the user writes `compute` and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.losses import LOSSES, DistillationLoss, FeatureLoss, LogitsLoss


class L1Loss(FeatureLoss):
    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()


class KLLoss(LogitsLoss):
    def __init__(self, num_labels: int, temperature: float = 1.0) -> None:
        super().__init__(num_labels)
        self.temperature = temperature

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        dim = self.class_dim(student)
        p, q = ((x / self.temperature).log_softmax(dim) for x in (teacher, student))
        return (p.exp() * (p - q)).sum(dim).mean() * self.temperature**2


def received(raw: bool, student: torch.dtype, teacher: torch.dtype) -> list[Tensor]:
    """What `compute` gets for maps of the two types, under autocast."""
    got: list[Tensor] = []

    class Records(L1Loss):
        raw_maps = raw

        def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
            got.extend((student, teacher, student.flatten(1) @ student.flatten(1).mT))
            return super().compute(student, teacher)

    x = torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        Records(4)(x.to(student).requires_grad_(), x.to(teacher).requires_grad_())
    return got


HALF, FULL, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("raw", "given", "want"),
    [
        (False, (HALF, HALF), (FULL, FULL)),
        (False, (HALF, FULL), (FULL, FULL)),
        (False, (torch.float16, DOUBLE), (FULL, FULL)),
        (False, (DOUBLE, HALF), (DOUBLE, DOUBLE)),
        (True, (HALF, FULL), (HALF, FULL)),
        (True, (DOUBLE, DOUBLE), (DOUBLE, DOUBLE)),
    ],
)
def test_the_base_casts(raw: bool, given: tuple[torch.dtype, ...], want: tuple[torch.dtype, ...]) -> None:
    student, teacher, product = received(raw, *given)
    assert (student.dtype, teacher.dtype) == want
    assert product.dtype == want[0], "autocast is on inside compute"
    assert student.requires_grad and not teacher.requires_grad


def test_what_a_loss_reads() -> None:
    assert FeatureLoss.reads == "maps" and LogitsLoss.reads == "logits"
    assert all(issubclass(loss, FeatureLoss if loss.reads == "maps" else LogitsLoss) for loss in LOSSES.values())
    # the two that cast block by block, to hold no map in a wider type
    assert {name for name, loss in LOSSES.items() if loss.raw_maps} >= {"cankd", "instance_mse"}
    assert not DistillationLoss.raw_maps


def test_a_feature_loss_of_three_lines() -> None:
    loss, student = L1Loss(4), torch.randn(2, 4, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    value = loss(student, torch.zeros(2, 4, 3, 5))
    value.backward()
    torch.testing.assert_close(value, student.detach().float().abs().mean())
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    assert loss.branch_share(student, student) is None and repr(loss) == "L1Loss(channels=4)"
    with pytest.raises(ValueError, match=r"L1Loss: expected two maps .*\[2, 4, 3, 5\].*\[2, 4, 5, 3\]"):
        loss(student, torch.zeros(2, 4, 5, 3))
    with pytest.raises(ValueError, match="at least one value"):
        loss(torch.zeros(0, 4, 3, 5), torch.zeros(0, 4, 3, 5))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 6, 5), (2, 5)], ids=["B K H W", "B N K", "B K"])
def test_a_logits_loss(shape: tuple[int, ...]) -> None:
    """KL against torch's, on every shape that logits come in; the classes stand where they should."""
    loss = KLLoss(5, temperature=2.0)
    student, teacher = torch.randn(2, *shape, requires_grad=True)
    classes_last = [x.movedim(2 if len(shape) == 3 else 1, -1).reshape(-1, 5) / 2 for x in (student, teacher)]
    q, p = (x.log_softmax(-1) for x in classes_last)
    want = 4 * torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss(student, teacher), want)
    assert loss(student, student).item() == pytest.approx(0, abs=1e-6)
    assert repr(loss) == "KLLoss(num_labels=5)"


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ((2, 4, 3, 3), (2, 7, 3, 3), r"KLLoss: expected two logits .*\[2, 4, 3, 3\].*\[2, 7, 3, 3\]"),
        ((2, 4, 3, 3), (2, 4, 6, 6), r"\[2, 4, 3, 3\].*\[2, 4, 6, 6\]"),
        ((2, 7, 3, 3), (2, 7, 3, 3), r"expected 4 classes, got student \[2, 7, 3, 3\] and teacher \[2, 7, 3, 3\]"),
        ((2, 4, 7), (2, 4, 7), "expected 4 classes"),
        ((2, 7), (2, 7), "expected 4 classes"),
        ((4,), (4,), "of one shape"),
        ((2, 4, 1, 1, 1), (2, 4, 1, 1, 1), "of one shape"),
        ((0, 4), (0, 4), "at least one value"),
    ],
    ids=str,
)
def test_logits_that_cannot_be_compared(student: tuple[int, ...], teacher: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KLLoss(4)(torch.zeros(student), torch.zeros(teacher))


def test_no_classes_at_all() -> None:
    with pytest.raises(InputError, match="KLLoss.num_labels: expected at least 1, got 0"):
        KLLoss(0)
