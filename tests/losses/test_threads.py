"""Threads of our own on the CPU: equal results, the same bits each time, and torch's setting is left as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cankd_hf.losses import CanKDLoss, InstanceMSELoss
from cankd_hf.losses.kernels import blocks

OPTIONS: list[dict[str, Any]] = [
    {},
    {"subsample": False},
    {"affinity": "gaussian"},
    {"affinity": "embedded_gaussian"},
    {"affinity": "concatenation"},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many pieces of a small map, and torch's own number of threads afterwards."""
    monkeypatch.setattr(blocks, "BLOCK_CPU", 256)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def computed(loss: torch.nn.Module, threads: int, batch: int = 2) -> list[Tensor]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    student, teacher = (torch.randn(batch, 8, 26, 14, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    loss.zero_grad()
    value = loss(student, teacher)
    value.backward()
    assert student.grad is not None and torch.get_num_threads() == threads
    grads = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
    return [value.detach(), student.grad, *grads]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_on_any_number_of_threads(options: dict[str, Any], batch: int) -> None:
    loss = CanKDLoss(8, **options).double()
    if loss.output_norm is not None:
        torch.nn.init.ones_(loss.output_norm.weight)
    one, three = computed(loss, 1, batch), computed(loss, 3, batch)
    torch.testing.assert_close(three, one, rtol=1e-11, atol=1e-13)
    again = computed(loss, 3, batch)
    assert all(torch.equal(a, b) for a, b in zip(three, again, strict=True))


def test_new_threads_get_the_number_that_was_set() -> None:
    computed(InstanceMSELoss(8), 2)
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [2]


def test_inference_mode() -> None:
    torch.set_num_threads(2)
    loss = CanKDLoss(8)
    maps = torch.randn(2, 2, 8, 26, 14)
    with torch.inference_mode():
        inferred = loss(*maps.clone())
    torch.testing.assert_close(inferred, loss(*maps))


def test_errors_of_any_thread_arrive() -> None:
    torch.set_num_threads(2)
    made = blocks.cut(torch.device("cpu"), 4, 64, 8)
    assert len(made.pieces) > 1

    def fail(piece: blocks.Piece, where: blocks.Where) -> None:
        if threading.current_thread() is not threading.main_thread() or piece.number == len(made.pieces) - 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        blocks.run(made, fail)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("options", [{}, {"affinity": "gaussian"}], ids=str)
def test_torchs_threads_rest_in_the_whole_pass(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a parallel region of torch they would spin for milliseconds on the cores of ours."""
    usual, seen = blocks._pieces, []

    def pieces(*args: Any) -> int:
        seen.append((torch.get_num_threads(), blocks._threads()))
        return usual(*args)

    monkeypatch.setattr(blocks, "_pieces", pieces)
    computed(CanKDLoss(8, **options).double(), threads=2)
    assert len(seen) >= 6 and set(seen) == {(1, 2)}


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_cut_covers_each_unit_once(batch: int, length: int, threads: int) -> None:
    torch.set_num_threads(threads)
    count = torch.zeros(batch, length)
    owner = torch.full((batch, length), -1)
    made = blocks.cut(torch.device("cpu"), batch, length, 64)
    for piece in made.pieces:
        assert piece.slot < made.slots
        for where in piece.blocks:
            count[where] += 1
            owner[where] = piece.slot
    assert (count == 1).all() and (owner >= 0).all()
