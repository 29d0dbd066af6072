"""The form for GPUs: equal to the equations, in few operations whatever the shape, and one graph when compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cankd_hf.losses import CanKDLoss, DistillationLoss, InstanceMSELoss
from cankd_hf.losses.kernels import blocks

OPTIONS: list[dict[str, Any]] = [
    {},
    {"affinity": "embedded_gaussian"},
    {"affinity": "gaussian"},
    {"affinity": "concatenation"},
    {"subsample": False},
    {"output_norm": "none"},
    {"normalization": "none"},
    {"residual": False},
]
# They launch nothing.
VIEWS = {"view", "_unsafe_view", "expand", "t", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {"squeeze_", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "lift_fresh"}
VIEWS |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Counts the operations that a device would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        self.found[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes on the CPU as on a GPU."""
    monkeypatch.setattr(blocks, "BLOCKWISE", frozenset())


def launches(loss: DistillationLoss, *shape: int) -> int:
    student, teacher = (torch.empty(shape, device="meta", requires_grad=own) for own in (True, False))
    with Launches() as counted:
        loss(student, teacher).backward()
    return counted.found.total()


@pytest.mark.parametrize("shape", [(2, 25, 42), (1, 200, 336), (16, 100, 168), (4, 1, 7)])
def test_few_launches_whatever_the_shape(shape: tuple[int, int, int]) -> None:
    batch, height, width = shape
    for options in ({}, {"subsample": False}, {"output_norm": "none"}, {"residual": False}):
        assert launches(CanKDLoss(64, **options).to("meta"), batch, 64, height, width) <= 60, options
    assert launches(InstanceMSELoss(64).to("meta"), batch, 64, height, width) <= 30


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_equations(options: dict[str, Any], whole: None) -> None:
    torch.manual_seed(0)
    loss = CanKDLoss(6, **options).double()
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    maps = [torch.randn(3, 6, 7, 9, dtype=torch.float64) + 2 for _ in range(2)]
    results = []
    for form in (loss, lambda s, t: loss.published(s, t)[1]):
        loss.load_state_dict(before)
        loss.zero_grad()
        student = maps[0].clone().requires_grad_()
        value = form(student, maps[1])
        value.backward()
        grads = {name: parameter.grad for name, parameter in loss.named_parameters()}
        results.append((value.detach(), student.grad, grads, dict(loss.named_buffers())))
    (value, grad, grads, buffers), (value_, grad_, grads_, buffers_) = results
    torch.testing.assert_close(value, value_, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, grad_, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads, grads_, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(buffers, buffers_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precise_far_from_zero(dtype: torch.dtype, whole: None) -> None:
    torch.manual_seed(0)
    maps = [(torch.randn(2, 8, 12, 14) + 30).to(dtype) for _ in range(2)]
    for loss in (CanKDLoss(8), InstanceMSELoss(8)):
        exact = type(loss)(8).double()
        exact.load_state_dict(loss.state_dict())
        assert loss(*maps).item() == pytest.approx(exact(*(x.double() for x in maps)).item(), rel=1e-5)


def test_compiles_to_one_graph(whole: None) -> None:
    torch._dynamo.reset()
    loss = CanKDLoss(8)
    student, teacher = (torch.randn(2, 8, 6, 10, requires_grad=own) for own in (True, False))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value: Tensor = compiled(student, teacher)
    value.backward()
    torch.testing.assert_close(value, loss(student, teacher))
