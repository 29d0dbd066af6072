"""The form for GPUs: equal to the equations, in few operations whatever the shape, and one graph when compiled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from cankd_hf.losses import CanKDLoss, DistillationLoss, InstanceMSELoss
from cankd_hf.losses.affinities import AFFINITIES
from cankd_hf.losses.kernels import blocks
from cankd_hf.losses.kernels import whole as kernels

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", CUDA]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"subsample": False},
    {"output_norm": "none"},
    {"normalization": "none"},
    {"residual": False},
    {"output_norm": "none", "normalization": "none", "residual": False, "subsample": False},
]
SHAPES = [(2, 25, 42), (1, 200, 336), (16, 100, 168), (4, 1, 7), (1, 3, 5)]
MOST = 60
# Operations for contiguous maps in float32 and in bfloat16.
LAUNCHES = {"dot_product": (35, 36), "embedded_gaussian": (31, 36), "gaussian": (31, 36), "concatenation": (58, 61)}
# They launch nothing.
VIEWS = {"view", "_unsafe_view", "expand", "t", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze"}
VIEWS |= {"squeeze_", "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "lift_fresh"}
VIEWS |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
# They make the host wait for the device: values read, shapes that depend on values, copies between the two.
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


class Launches(TorchDispatchMode):
    """Counts the operations that a device would launch, and the bytes that their results hold at once."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.inputs = [value.untyped_storage() for value in inputs]
        self.live: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        self.found[name] += name not in VIEWS
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if not any(storage is known for known in self.inputs):
                    self.live[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes on the CPU as on a GPU."""
    monkeypatch.setattr(blocks, "BLOCKWISE", frozenset())
    monkeypatch.setattr(kernels, "HALF", frozenset({"cpu", "meta", "cuda"}))


def maps(*shape: int, device: str, dtype: torch.dtype = torch.float32, last: bool = False) -> tuple[Tensor, Tensor]:
    form = torch.channels_last if last else torch.contiguous_format
    student, teacher = (
        torch.empty(shape, device=device, dtype=dtype).normal_().to(memory_format=form) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def count(loss: DistillationLoss, student: Tensor, teacher: Tensor) -> Launches:
    loss.zero_grad()  # adding to gradients that are there is not the loss's
    with Launches(student, teacher, *loss.parameters(), *loss.buffers()) as counted:
        loss(student, teacher).backward()
    assert WAITS.isdisjoint(counted.found)
    return counted


def counting_device(affinity: str) -> str:
    """The meta device takes softmax attention apart, the CPU has one operation for it, as a GPU has."""
    return "meta" if AFFINITIES[affinity].value_range != "softmax" else "cpu"


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_few_launches_whatever_the_options(affinity: str, whole: None) -> None:
    device, (wide, half) = counting_device(affinity), LAUNCHES[affinity]
    for options in OPTIONS:
        for mode in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                for last in (False, True):
                    loss = CanKDLoss(16, affinity=affinity, **options).to(device).train(mode)
                    found = count(loss, *maps(2, 16, 6, 7, device=device, dtype=dtype, last=last)).found.total()
                    # the concatenation of maps that need a conversion: two more
                    assert found <= MOST + 2 * (affinity == "concatenation"), (options, mode, dtype, last)
                    if not options and mode and not last:
                        assert found == (wide if dtype == torch.float32 else half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affinity", ["dot_product", "concatenation"])
def test_launches_do_not_depend_on_the_shape(affinity: str, dtype: torch.dtype) -> None:
    loss = CanKDLoss(64, affinity=affinity).to("meta")
    counts = [
        count(loss, *maps(batch, 64, height, width, device="meta", dtype=dtype)).found.total()
        for batch, height, width in SHAPES
    ]
    assert set(counts[:3]) == {LAUNCHES[affinity][dtype == torch.bfloat16]}
    # fewer positions than channels: gradients of weights over all images at once
    assert max(counts) <= MOST + 2 * (affinity == "concatenation")


def test_launches_of_the_plain_distance() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert count(InstanceMSELoss(64).to("meta"), *maps(2, 64, 9, 8, device="meta", dtype=dtype)).found.total() == 8


@pytest.mark.parametrize(
    ("affinity", "dtype", "most"),
    [
        ("dot_product", torch.float32, 2.4),
        ("dot_product", torch.bfloat16, 2.4),
        ("concatenation", torch.float32, 2.8),
        (None, torch.float32, 1.01),
        (None, torch.bfloat16, 1.01),
    ],
)
def test_memory(affinity: str | None, dtype: torch.dtype, most: float) -> None:
    """Beyond the two maps and in units of them, gradients included."""
    loss = (InstanceMSELoss(256) if affinity is None else CanKDLoss(256, affinity=affinity)).to("meta")
    student, teacher = maps(2, 256, 100, 168, device="meta", dtype=dtype)
    assert count(loss, student, teacher).peak <= most * 2 * student.numel() * student.element_size()


@pytest.mark.parametrize(
    "options", [{"affinity": name, **options} for name in AFFINITIES for options in OPTIONS], ids=str
)
@pytest.mark.parametrize("device", DEVICES)
def test_equals_the_equations(options: dict[str, Any], device: str, whole: None) -> None:
    if options["affinity"] == "gaussian" and not options.get("subsample", True):
        pytest.skip("the published form does not have it")
    equals_the_equations(CanKDLoss(6, **options).to(device), (3, 6, 7, 9))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"subsample": False}, {"residual": False}, {"normalization": "none"}], ids=str
)
def test_the_dot_product_equals_the_equations_on_small_maps(
    options: dict[str, Any], device: str, momentum: float | None, train: bool, whole: None
) -> None:
    """Fewer positions than channels, with few keys and without; B gradients of the layers and one."""
    for shape in ((2, 40, 3, 5), (3, 40, 4, 6), (2, 8, 3, 4)):
        loss = CanKDLoss(shape[1], **options).to(device).train(train)
        loss.output_norm.momentum = momentum
        equals_the_equations(loss, shape)


def equals_the_equations(loss: CanKDLoss, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    loss = loss.double()
    for parameter in loss.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    made = [torch.randn(shape, dtype=torch.float64).to(loss.w.weight) + 2 for _ in range(2)]
    results = []
    for form in (loss, lambda s, t: loss.published(s, t)[1]):
        loss.load_state_dict(before)
        loss.zero_grad()
        student = made[0].clone().requires_grad_()
        value = form(student, made[1])
        value.backward()
        grads = {name: parameter.grad for name, parameter in loss.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}
        results.append((value.detach(), student.grad, grads, buffers))
    (value, grad, grads, buffers), (value_, grad_, grads_, buffers_) = results
    torch.testing.assert_close(value, value_, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, grad_, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads, grads_, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(buffers, buffers_)


@pytest.mark.parametrize("name", AFFINITIES)
def test_a_graph_that_is_kept_gives_its_gradients_again(name: str, whole: None) -> None:
    torch.manual_seed(0)
    loss, (student, teacher) = CanKDLoss(8, affinity=name), maps(2, 8, 6, 10, device="cpu")
    nn.init.normal_(loss.output_norm.weight)
    inputs = [student, *loss.parameters()]
    value = loss(student, teacher)
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    loss(student, teacher)  # moves the running statistics
    torch.testing.assert_close(torch.autograd.grad(value, inputs), first, rtol=0, atol=0)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "tokens": lambda x: x.flatten(2).mT.contiguous().mT.unflatten(2, x.shape[2:]),
    "a piece": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
    "rows and columns changed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("form", ["blockwise", "whole"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*AFFINITIES, "instance_mse"])
def test_any_layout(name: str, layout: str, form: str, request: pytest.FixtureRequest) -> None:
    """Teachers made of tokens and channels-last students give maps that are not contiguous."""
    if form == "whole":
        request.getfixturevalue("whole")
    loss = (InstanceMSELoss(6) if name == "instance_mse" else CanKDLoss(6, affinity=name)).double().eval()
    student, teacher = (torch.randn(2, 6, 5, 7, dtype=torch.float64) for _ in range(2))
    results = []
    for change in (lambda x: x, LAYOUTS[layout]):
        for both in (False, True):
            s = student.clone().requires_grad_()
            value = loss(change(s) if both else s, change(teacher))
            results.append((value.detach(), *torch.autograd.grad(value, s)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*AFFINITIES, "instance_mse"])
def test_bfloat16_is_about_as_close_as_the_published_form_under_autocast(name: str, device: str, whole: None) -> None:
    torch.manual_seed(0)
    loss = (InstanceMSELoss(16) if name == "instance_mse" else CanKDLoss(16, affinity=name)).to(device)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.3)
    exact = type(loss)(*([16] if name == "instance_mse" else [16, None, name])).double().to(device)
    exact.load_state_dict(loss.state_dict())
    student, teacher = ((torch.randn(2, 16, 12, 14) + 3).to(device, torch.bfloat16) for _ in range(2))

    def error(value: Tensor, grad: Tensor) -> tuple[float, float]:
        off = (grad.double() - true_grad).norm() / true_grad.norm()
        return abs(value.item() / true.item() - 1), off.item()

    def run(form: Any, s: Tensor) -> tuple[Tensor, Tensor]:
        s = s.detach().requires_grad_()
        value = form(s)
        return value.detach(), torch.autograd.grad(value, s)[0]

    true, true_grad = run(lambda s: exact(s, teacher.double()), student.double())
    of_value, of_grad = error(*run(lambda s: loss(s, teacher), student))
    if name == "instance_mse":
        bounds = (1e-3, 1e-2)
    else:
        with torch.autocast(device, torch.bfloat16):
            bounds = error(*run(lambda s: loss.published(s, teacher)[1], student))
    # flash attention rounds weights that the published form keeps in float32
    factor = 4 if name == "embedded_gaussian" else 2
    assert of_value < 5e-3 and of_grad < factor * bounds[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_precise_far_from_zero(dtype: torch.dtype, device: str, whole: None) -> None:
    torch.manual_seed(0)
    made = [(torch.randn(2, 8, 12, 14) + 30).to(device, dtype) for _ in range(2)]
    for loss in (CanKDLoss(8).to(device), InstanceMSELoss(8)):
        exact = type(loss)(8).double().to(device)
        exact.load_state_dict(loss.state_dict())
        want = exact(*(x.double() for x in made)).item()
        # normalised values of bfloat16 maps are rounded to bfloat16
        assert loss(*made).item() == pytest.approx(want, rel=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("name", [*AFFINITIES, "instance_mse"])
def test_compiles_to_one_graph(name: str, whole: None) -> None:
    torch._dynamo.reset()
    loss = InstanceMSELoss(8) if name == "instance_mse" else CanKDLoss(8, affinity=name)
    student, teacher = maps(2, 8, 6, 10, device="cpu")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value: Tensor = compiled(student, teacher)
    value.backward()
    torch.testing.assert_close(value, loss(student, teacher))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*AFFINITIES, "instance_mse"])
def test_never_waits_for_the_gpu(name: str, dtype: torch.dtype) -> None:
    loss = (InstanceMSELoss(16) if name == "instance_mse" else CanKDLoss(16, affinity=name)).cuda()
    student, teacher = maps(2, 16, 9, 10, device="cuda", dtype=dtype)
    loss(student, teacher).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(student, teacher).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert student.grad is not None and torch.isfinite(student.grad).all()
