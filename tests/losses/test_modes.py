"""What belongs to one thread in torch, or watches it, holds for the threads of the loss as well."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cankd_hf.losses import CanKDLoss, InstanceMSELoss
from cankd_hf.losses.kernels import blocks

KINDS: list[dict[str, Any] | None] = [
    None,
    {},
    {"subsample": False},
    {"affinity": "gaussian"},
    {"affinity": "embedded_gaussian"},
    {"affinity": "concatenation"},
]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many pieces of a small map on two threads."""
    monkeypatch.setattr(blocks, "BLOCK_CPU", 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def made(options: dict[str, Any] | None) -> torch.nn.Module:
    if options is None:
        return InstanceMSELoss(8)
    loss = CanKDLoss(8, **options)
    assert loss.output_norm is not None
    torch.nn.init.ones_(loss.output_norm.weight)
    return loss


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_backward_within_autocast(options: dict[str, Any] | None) -> None:
    loss, (student, teacher) = made(options), torch.randn(2, 2, 8, 26, 14)
    grads = []
    for enabled in (False, True):
        x = student.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss(x, teacher).backward()
        grads.append(x.grad)
    # exact in functions of our own; products of autograd's own are in bfloat16 then
    limit = 0.0 if options in (None, {}, {"affinity": "gaussian"}) else 0.02 * grads[0].abs().max().item()
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=limit)


class Seen(TorchDispatchMode):
    """Counts operations, by the threads that ran them."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.threads.append(threading.get_ident())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"affinity": "concatenation"}], ids=str)
def test_modes_see_every_operation(options: dict[str, Any]) -> None:
    loss, (student, teacher) = made(options), torch.randn(2, 2, 8, 26, 14)

    def seen() -> list[int]:
        with Seen() as mode:
            loss(student.clone().requires_grad_(), teacher).backward()
        return mode.threads

    first, again = seen(), seen()
    assert len(first) == len(again) and set(first) == {threading.get_ident()}


@pytest.mark.parametrize("options", [None, {}], ids=str)
def test_fake_tensors(options: dict[str, Any] | None) -> None:
    loss, maps = made(options), torch.randn(2, 2, 8, 26, 14)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        student, teacher = (mode.from_tensor(x) for x in maps)
        loss(student.requires_grad_(), teacher).backward()
    assert student.grad is not None and student.grad.shape == maps[0].shape


def test_transforms_are_refused_as_on_one_thread() -> None:
    maps = torch.randn(2, 3, 2, 8, 26, 14)
    for options in (None, {}):
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.vmap(made(options))(*maps)


def pieces(number: int = 8) -> blocks.Cut:
    one: Any = (slice(0, 1), slice(0, 1))
    return blocks.Cut([blocks.Piece(index, index, [one]) for index in range(number)], number)


def test_after_an_error_no_piece_begins_and_none_is_left_running() -> None:
    begun, ended, failed = [], [], threading.Event()

    def work(piece: blocks.Piece, _: Any) -> None:
        begun.append(piece.number)
        if piece.number == 0:
            ended.append(piece.number)
            failed.set()
            raise ZeroDivisionError("piece 0")
        failed.wait(60)  # however late the first one is, the others begin after it has failed
        time.sleep(0.02)
        ended.append(piece.number)

    with pytest.raises(ZeroDivisionError, match="piece 0"):
        blocks.run(pieces(200), work)
    assert sorted(begun) == sorted(ended) and len(begun) < 200


@pytest.mark.parametrize("failing", ["_pool", "submit"])
def test_without_further_threads_one_does_all(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("can't start new thread")

    if failing == "_pool":
        monkeypatch.setattr(blocks, "_pool", refuse)
    else:
        monkeypatch.setattr(blocks.ThreadPoolExecutor, "submit", refuse)
    done: list[int] = []
    blocks.run(pieces(), lambda piece, _: done.append(piece.number))
    assert done == list(range(8)) and torch.get_num_threads() == 2


def test_a_small_map_is_computed_by_one_thread() -> None:
    seen: list[int] = []
    blocks.run(pieces(1), lambda *_: seen.append(torch.get_num_threads()))
    assert seen == [1] and torch.get_num_threads() == 2


def values(loss: torch.nn.Module, maps: Tensor) -> list[Tensor]:
    student = maps[0].clone().requires_grad_()
    value = loss(student, maps[1])
    value.backward()
    assert student.grad is not None
    return [value.detach(), student.grad]


def test_called_from_several_threads_at_once() -> None:
    loss, maps = made({}), torch.randn(2, 2, 8, 26, 14)
    wanted, found = values(loss, maps), [None] * 4

    def work(index: int) -> None:
        found[index] = values(copy.deepcopy(loss), maps)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for got in found:
        torch.testing.assert_close(got, wanted)
    assert torch.get_num_threads() == 2
