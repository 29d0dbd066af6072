"""The attention of one pixel against the published formula, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cankd_hf.losses import CanKDLoss, attention_map
from cankd_hf.losses.affinities import AFFINITIES


def naive(loss: CanKDLoss, student: torch.Tensor, teacher: torch.Tensor, pixel: tuple[int, int]) -> torch.Tensor:
    """`f_ij` of one query i over all keys j, [h, w], from whole convolved and pooled maps [1, C, H, W]."""
    pool = (lambda x: F.max_pool2d(x, 2)) if loss.subsample and min(teacher.shape[2:]) > 1 else (lambda x: x)
    row, column = pixel
    if loss.affinity == "gaussian":
        key, query = pool(teacher)[0], student[0, :, row, column]
    else:
        key, query = pool(loss.phi(teacher))[0], loss.theta(student)[0, :, row, column]
    count = key[0].numel()
    result = torch.empty(key.shape[1:], dtype=key.dtype)
    for y in range(key.shape[1]):
        for x in range(key.shape[2]):
            if loss.affinity == "concatenation":
                both = torch.cat([query, key[:, y, x]])
                result[y, x] = torch.relu((loss.concat.weight.flatten() * both).sum()) / count
            else:
                result[y, x] = (query * key[:, y, x]).sum()
    if loss.affinity == "dot_product":
        return result / count
    return result if loss.affinity == "concatenation" else result.flatten().softmax(0).view_as(result)


@pytest.mark.parametrize("subsample", [True, False])
@pytest.mark.parametrize("size", [(6, 10), (5, 7), (1, 4)])
@pytest.mark.parametrize("name", list(AFFINITIES))
def test_equals_the_formula(name: str, size: tuple[int, int], subsample: bool) -> None:
    loss = CanKDLoss(6, affinity=name, subsample=subsample).double()
    student, teacher = torch.randn(2, 1, 6, *size, dtype=torch.float64)
    for pixel in [(0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, 1)]:
        got = attention_map(loss, student[0], teacher[0], pixel)
        with torch.no_grad():
            want = naive(loss, student, teacher, pixel)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        if name in ("embedded_gaussian", "gaussian"):
            assert got.sum().item() == pytest.approx(1)


def test_reads_what_the_block_reads() -> None:
    """The row times the values, through w, is the block's output at that pixel."""
    loss = CanKDLoss(4, output_norm="none", residual=False).double()
    torch.nn.init.normal_(loss.w.weight)
    student, teacher = torch.randn(2, 1, 4, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        value = F.max_pool2d(loss.g(teacher), 2)[0].flatten(1)  # [D, M]
        read = value @ attention_map(loss, student[0], teacher[0], (2, 5)).flatten()
        want = loss.w(read[None, :, None, None])[0, :, 0, 0]
        torch.testing.assert_close(loss.transform(student, teacher)[0, :, 2, 5], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pixel", [(-1, 0), (4, 0), (0, 6)])
def test_a_pixel_outside_is_refused(pixel: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="inside 4 x 6 cells"):
        attention_map(CanKDLoss(3), torch.zeros(3, 4, 6), torch.zeros(3, 4, 6), pixel)
