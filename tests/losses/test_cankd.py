"""CanKDLoss against the equations, on every kind of map and in every way it is run."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cankd_hf.errors import InputError
from cankd_hf.losses import CanKDLoss, affinities, cankd_options
from cankd_hf.losses.kernels import blocks

AFFINITIES = list(affinities.AFFINITIES)


def build(dtype: torch.dtype = torch.float64, channels: int = 6, **options: object) -> CanKDLoss:
    """A block away from its start, where every parameter matters."""
    loss = CanKDLoss(channels, **options).to(dtype)  # type: ignore[arg-type]
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return loss


def maps(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)


def grads(value: Tensor, student: Tensor, loss: CanKDLoss) -> list[Tensor]:
    return list(torch.autograd.grad(value, [student, *loss.parameters()]))


def assert_equal_with_gradients(loss: CanKDLoss, student: Tensor, teacher: Tensor) -> None:
    _, want = loss.published(student, teacher)
    want_grads = grads(want, student, loss)
    got = loss(student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads(got, student, loss), want_grads, rtol=1e-8, atol=1e-10)


@pytest.fixture(params=[1 << 18, 100], ids=["whole", "blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_CPU", request.param)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("size", [(2, 6, 10), (3, 7, 5), (1, 1, 9), (2, 4, 1), (2, 1, 1), (2, 2, 3)])
@pytest.mark.parametrize("name", AFFINITIES)
def test_equals_the_equations_on_any_size(name: str, size: tuple[int, int, int]) -> None:
    # one pixel has no instance norm in torch
    loss = build(affinity=name, normalization="none" if size[1:] == (1, 1) else "instance")
    student, teacher = maps(size[0], 6, *size[1:])
    assert_equal_with_gradients(loss, student, teacher)


@pytest.mark.parametrize(
    "options",
    [
        {"subsample": False},
        {"output_norm": "none"},
        {"normalization": "none"},
        {"residual": False},
        {"hidden_channels": 9},
        {"residual": False, "normalization": None, "output_norm": None, "subsample": False, "hidden_channels": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", AFFINITIES)
@pytest.mark.parametrize("train", [True, False])
def test_equals_the_equations_with_any_option(name: str, options: dict, train: bool) -> None:
    loss = build(affinity=name, **options).train(train)
    student, teacher = maps(2, 6, 5, 8)
    twin = copy.deepcopy(loss)
    assert_equal_with_gradients(loss, student, teacher)
    # the two calls above updated the same statistics twice
    for _ in range(2):
        twin.published(student, teacher)
    torch.testing.assert_close(dict(loss.named_buffers()), dict(twin.named_buffers()))
    torch.testing.assert_close(loss.transform(student, teacher), loss.published(student, teacher)[0])


def test_gaussian_without_sub_sampling_has_a_form() -> None:
    """The published code crashes here; its definition does not."""
    loss = build(affinity="gaussian", subsample=False)
    student, teacher = maps(1, 6, 3, 4)
    s, t = student[0].flatten(1), teacher[0].flatten(1)
    value = loss.g(teacher)[0].flatten(1)
    read = torch.stack([(s[:, i] @ t).softmax(0) @ value.T for i in range(12)], dim=1)
    z = student + loss.output_norm(loss.w(read.view(1, 3, 3, 4)))  # type: ignore[misc]
    torch.testing.assert_close(loss.transform(student, teacher), z)


def test_one_pixel_maps_give_zero_in_instance_norm() -> None:
    loss = build()
    student, teacher = maps(2, 6, 1, 1)
    value = loss(student, teacher)
    assert value.item() == 0
    assert all(torch.isfinite(grad).all() for grad in grads(value, student, loss))


def test_says_once_that_it_does_not_pool(caplog: pytest.LogCaptureFixture) -> None:
    cankd_options.warn_not_pooled.cache_clear()
    loss = build()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            loss(*maps(2, 6, 1, 9))
    assert [record.message for record in caplog.records] == [
        "CanKD: a map of size (1, 9) cannot be pooled 2x2: its keys and values are not sub-sampled"
    ]


@pytest.mark.parametrize("name", AFFINITIES)
def test_starts_as_the_plain_distance(name: str) -> None:
    """At the start z = s, and of all parameters only the output norm's weight has a gradient that is not 0."""
    loss = CanKDLoss(6, affinity=name).double()
    student, teacher = maps(2, 6, 6, 8)
    value = loss(student, teacher)
    s, t = (x.flatten(2) - x.flatten(2).mean(-1, keepdim=True) for x in (student, teacher))
    r = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    torch.testing.assert_close(value, (1 - r).mean(), rtol=1e-4, atol=1e-4)
    value.backward()
    moving = [key for key, parameter in loss.named_parameters() if parameter.grad.abs().max() > 0]  # type: ignore[union-attr]
    assert moving == ["output_norm.weight"]
    assert loss.branch_share(student, teacher).item() == 0


@pytest.mark.parametrize("name", AFFINITIES)
def test_channels_last(name: str) -> None:
    loss = build(affinity=name)
    student, teacher = maps(2, 6, 7, 8)
    want = loss(student, teacher)
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    got = loss(last, teacher.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want)
    got_grads = grads(got, last, loss)
    torch.testing.assert_close(got_grads, grads(want, student, loss))
    assert got_grads[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", AFFINITIES)
def test_half_maps_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    loss = build(torch.float32, affinity=name)
    student, teacher = maps(2, 6, 8, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss(student, teacher)
    exact = student.detach().float().requires_grad_()
    want = loss(exact, teacher.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    for a, b in zip(grads(got, student, loss), grads(want, exact, loss), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2 if a.dtype == dtype else 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", AFFINITIES)
def test_gradient_checkpointing(name: str) -> None:
    loss = build(affinity=name).eval()
    student, teacher = maps(2, 6, 6, 8)
    want = loss(student, teacher)
    got = checkpoint(loss, student, teacher, use_reentrant=False)
    torch.testing.assert_close(grads(got, student, loss), grads(want, student, loss))


# the others compile by default in the form for whole maps (test_whole.py), whose options are the same
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "dot_product")) for name in AFFINITIES]
)
def test_compiles_to_one_graph(name: str) -> None:
    loss = build(affinity=name)
    student, teacher = maps(2, 6, 6, 8)
    want = loss(student, teacher)
    # the tracer alone: what inductor makes of the graph takes many seconds and is torch's to test
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads(got, student, loss), grads(want, student, loss))


class Largest(TorchDispatchMode):
    """The number of values in the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.values = max(self.values, value.numel())
        return result


@pytest.mark.parametrize("subsample", [True, False])
@pytest.mark.parametrize("name", AFFINITIES)
def test_no_tensor_of_queries_times_keys(name: str, subsample: bool) -> None:
    loss = build(torch.float32, affinity=name, subsample=subsample)
    student, teacher = maps(2, 6, 40, 40, dtype=torch.float32)
    with Largest() as largest:
        loss(student, teacher).backward()
    # padded to a width of 8, at most a map of its own inputs' size; an affinity would have 200 times as many values
    assert largest.values <= 2 * 8 * 1600


def test_branch_share() -> None:
    loss = build()
    student, teacher = maps(2, 6, 6, 8)
    output = loss.transform(student, teacher) - student
    torch.testing.assert_close(loss.branch_share(student, teacher), (output.norm() / student.norm()).detach())


def test_cumulative_running_statistics() -> None:
    """momentum None averages all batches, as in torch."""
    loss = build()
    assert loss.output_norm is not None
    loss.output_norm.momentum = None
    twin = torch.nn.BatchNorm2d(6, momentum=None).double()
    for _ in range(3):
        student, teacher = maps(2, 6, 6, 8)
        plain = build(output_norm="none", residual=False)
        plain.load_state_dict({k: v for k, v in loss.state_dict().items() if "output_norm" not in k})
        twin(plain.transform(student, teacher))
        loss(student, teacher)
    torch.testing.assert_close(loss.output_norm.running_mean, twin.running_mean)
    torch.testing.assert_close(loss.output_norm.running_var, twin.running_var)


def test_from_reference_says_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="non_local_att.g.weight"):
        CanKDLoss.from_reference({"something": torch.ones(1)})
    state = {
        "distill.loss.non_local_att.g.0.weight": torch.ones(3, 6, 1, 1),
        "distill.loss.non_local_att.g.0.bias": torch.ones(3),
        "distill.loss.non_local_att.W.weight": torch.ones(6, 3, 1, 1),
        "distill.loss.non_local_att.W.bias": torch.ones(6),
    }
    loss = CanKDLoss.from_reference(state)
    assert (loss.affinity, loss.subsample, loss.output_norm, loss.hidden_channels) == ("gaussian", True, None, 3)
    with pytest.raises(InputError, match="theta.weight"):
        CanKDLoss.from_reference(state, affinity="dot_product")


def test_bad_options_are_said_together() -> None:
    with pytest.raises(InputError) as caught:
        CanKDLoss(6, hidden_channels=0, affinity="dot", output_norm="layer", normalization="batch")
    assert len(caught.value.problems) == 4
