"""Connectors: any two maps come out on one grid with the teacher's channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cankd_hf.errors import InputError
from cankd_hf.features import Connector, Level
from cankd_hf.features.connectors import GRIDS


def connector(student: int, teacher: int, grid: str = "finer") -> Connector:
    return Connector(Level("s", student, 16, (1, 1)), Level("t", teacher, 14, (1, 1)), grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("ours", "theirs"), [((15, 12), (16, 14)), ((16, 13), (7, 6)), ((1, 9), (5, 1))])
def test_any_sizes(grid: str, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    layer = connector(6, 10, grid)
    student = torch.randn(2, 6, *ours, requires_grad=True)
    s, t = layer(student, torch.randn(2, 10, *theirs))
    assert s.shape == t.shape
    cells = {"student": ours, "teacher": theirs, "finer": max, "coarser": min}[grid]
    if callable(cells):
        cells = cells(ours, theirs, key=lambda size: size[0] * size[1])
    assert s.shape == (2, 10, *cells)
    s.sum().backward()
    assert student.grad is not None and layer.projection.weight.grad is not None


def test_equal_maps_pass_untouched() -> None:
    layer = connector(8, 8)
    assert isinstance(layer.projection, nn.Identity)
    maps = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    assert all(a is b for a, b in zip(layer(*maps), maps, strict=True))


def test_projection_and_resize_commute() -> None:
    down, up = connector(6, 10, "teacher").double(), torch.randn(1, 6, 9, 9, dtype=torch.float64)
    for size in ((5, 4), (12, 13)):
        s, _ = down(up, torch.zeros(1, 10, *size, dtype=torch.float64))
        other = nn.functional.interpolate(down.projection(up), size, mode="bilinear", antialias=size[0] < 9)
        assert torch.allclose(s, other)


def test_bad_grid() -> None:
    with pytest.raises(
        InputError, match=r"distill\.grid: expected one of finer, coarser, student, teacher, got 'big'"
    ):
        connector(1, 1, "big")
