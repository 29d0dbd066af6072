"""Maps of whole images cut out on the CPU, and the check of each map for NaN and infinity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cankd_hf.teachers import pictures
from cankd_hf.teachers.codecs import Exact, Half, Rows
from cankd_hf.teachers.pictures import Grid, WholeImages, cut_out
from cankd_hf.training.finite_scores import bad_images

BOXES = [(0.0, 0.0, 48.0, 32.0), (-31.5, -10.25, 60.5, 51.0), (7.0, 5.0, 31.0, 21.0), (-200.0, -90.0, 56.0, 80.0)]
GRID = Grid((8, 12), (32, 48))


def both(monkeypatch: pytest.MonkeyPatch, maps: Tensor, grid: Grid = GRID) -> tuple[Tensor, Tensor]:
    made = []
    for large in (1, 1 << 40):
        monkeypatch.setattr(pictures, "LARGE", large)
        made.append(cut_out(maps, torch.tensor(BOXES), grid))
    return made[0], made[1]


@pytest.mark.parametrize("grid", [GRID, Grid((5, 7), (40, 56)), Grid((1, 1), (32, 48))], ids=str)
@pytest.mark.parametrize("cells", [(16, 24), (1, 1), (3, 50)])
def test_products_are_the_grid_sample(monkeypatch: pytest.MonkeyPatch, cells: tuple[int, int], grid: Grid) -> None:
    maps = torch.randn(4, 6, *cells).half()
    products, sampled = both(monkeypatch, maps, grid)
    assert products.shape == (4, 6, *grid.size) and products.dtype == sampled.dtype == torch.float32
    torch.testing.assert_close(products, sampled, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_what_is_not_finite_does_not_spread(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    maps = torch.randn(4, 6, 16, 24)
    maps[1, 2, 8, 12] = maps[3, :, 15, 23] = bad
    products, sampled = both(monkeypatch, maps)
    assert torch.equal(products.isnan(), sampled.isnan()) and torch.equal(products.isinf(), sampled.isinf())
    assert bad_images(products, mask=False).any() and not products[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_cut_before_they_are_widened_with_the_same_values(dtype: torch.dtype) -> None:
    found = {"maps.0": torch.randn(4, 6, 16, 24).to(dtype), "maps.1": torch.randn(4, 6, 16, 24).to(dtype)}
    rows = Rows({"maps.0": Half(), "maps.1": Exact()})
    layout, packed = rows.pack(found)
    narrow, wide = rows.unpack(layout, packed, narrow=True), rows.unpack(layout, packed)
    assert narrow["maps.0"].dtype == (torch.float16 if dtype == torch.float32 else dtype)
    place = torch.cat([torch.tensor(BOXES), torch.zeros(4, 1)], 1)
    load = torch.zeros_like  # never asked
    one = WholeImages([b""] * 4, torch.arange(4), place, torch.device("cpu"), load, dict.fromkeys(found, GRID))  # type: ignore[arg-type]
    types = rows.types(layout)
    for of in (one, replace(one, place=place.flip(0))):
        cut, usual = of.cut(range(4), narrow, types), of.cut(range(4), wide, types)
        assert all(torch.equal(cut[name], usual[name]) and cut[name].dtype == dtype for name in found)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_images_that_are_not_finite_are_found(dtype: torch.dtype, mask: bool) -> None:
    floating = dtype.is_floating_point
    value = (60000 * torch.rand(5, 3, 40, 7)).to(dtype)
    assert not bad_images(value, mask).any(), "finite, although its sum in half precision is not"
    assert bad_images(value[:, :, :0], mask).tolist() == [False] * 5
    if floating:
        value[1, 2, 39, 6], value[2, 0, 0, 0], value[4, 1, 5, 5] = float("nan"), float("inf"), float("-inf")
        value[3] = torch.finfo(dtype).max
        assert bad_images(value, mask).tolist() == [False, True, True, False, not mask]
