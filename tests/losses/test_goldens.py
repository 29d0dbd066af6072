"""CanKDLoss against the authors' code: 66 float64 cases, values, gradients and running statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cankd_hf.losses import CanKDLoss
from cankd_hf.losses.cankd import _our_name

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
CASES = json.loads((GOLDENS / "can.json").read_text())
OPTIONS: dict[str, dict] = {
    "dot": {},
    "woin": {"normalization": "none"},
    "woskip": {"residual": False},
    "egauss": {"affinity": "embedded_gaussian"},
    "gauss": {"affinity": "gaussian"},
    "concat": {"affinity": "concatenation"},
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDENS / "can.safetensors")


def build(case: dict, tensors: dict[str, Tensor]) -> tuple[CanKDLoss, dict[str, Tensor]]:
    prefix = case["name"] + "/"
    mine = {key[len(prefix) :]: value.clone() for key, value in tensors.items() if key.startswith(prefix)}
    state = {key[len("state.") :]: value for key, value in mine.items() if key.startswith("state.")}
    loss = CanKDLoss.from_reference(state, subsample=case["sub_sample"], **OPTIONS[case["variant"]])
    return loss.train(case["mode"] == "train"), mine


def assert_close(name: str, got: Tensor | None, want: Tensor, rtol: float) -> None:
    """Relative to the largest value of the tensor; what vanishes in theory is compared absolutely, to 1e-12."""
    assert got is not None, f"{name} has no gradient"
    error = (got - want.reshape(got.shape)).abs().max().item()
    assert error <= max(rtol * want.abs().max().item(), 1e-12), f"{name}: off by {error:.3g}"


def test_all_cases_are_here() -> None:
    assert len(CASES) == 66


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_equals_the_authors_code(case: dict, device: str, tensors: dict[str, Tensor]) -> None:
    loss, golden = build(case, {key: value.to(device) for key, value in tensors.items()})
    student = golden["student"].requires_grad_()
    assert_close("z", loss.transform(student, golden["teacher"]), golden["transformed_student"], 1e-10)
    value = loss(student, golden["teacher"])
    assert abs(value.item() - golden["loss"].item()) <= 1e-10
    value.backward()
    assert_close("student", student.grad, golden["grad.student"], 1e-8)
    named = dict(loss.named_parameters())
    grads = {_our_name(key[len("grad.") :]): want for key, want in golden.items() if key.startswith("grad.non_local")}
    assert set(grads) == set(named)
    for name, want in grads.items():
        assert_close(name, named[name].grad, want, 1e-8)
    after = {_our_name(key[len("after.") :]): want for key, want in golden.items() if key.startswith("after.")}
    assert bool(after) == (case["bn_layer"] and case["mode"] == "train")
    buffers = dict(loss.named_buffers())
    for name, want in after.items():
        assert_close(name, buffers[name], want, 1e-10)
