"""Conditioning of targets: what each promises of maps of any scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.losses.targets import CONDITIONINGS, Measured, equalising, hadamard


def fitted(kind: str, maps: Tensor, parts: int = 1) -> Any:
    """A conditioning whose statistics are those of the maps, seen in so many batches."""
    made = CONDITIONINGS[kind](maps.shape[1])
    if isinstance(made, Measured):
        assert not made.is_ready
        made.settle(torch.stack([made.sums(part) for part in maps.chunk(parts)]).sum(0))
        assert made.is_ready and made.ready
    return made


def maps(channels: int = 12, batch: int = 6) -> Tensor:
    """Correlated channels of means and scales of their own, in float64."""
    mix = torch.randn(channels, channels, dtype=torch.float64)
    x = torch.randn(batch, channels, 9, 7, dtype=torch.float64)
    return torch.einsum("oc,bchw->bohw", mix, x) + 5 * torch.randn(1, channels, 1, 1, dtype=torch.float64)


def cells(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2)


def test_the_recipe_knows_them_all() -> None:
    LossTerm(conditioning="phi_s").check()
    with pytest.raises(InputError, match="expected one of none, layer, l2, channel, global, phi_s, clip"):
        LossTerm(conditioning="instance").check()  # type: ignore[arg-type]
    assert list(CONDITIONINGS) == ["layer", "l2", "channel", "global", "phi_s", "clip"]


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_batches_add_up_and_half_precision_works(kind: str) -> None:
    x = maps()
    whole, parts = fitted(kind, x), fitted(kind, x, parts=3)
    torch.testing.assert_close(whole(x), parts(x))
    with torch.autocast("cpu", torch.bfloat16):
        half = whole(x.bfloat16())
    assert half.dtype == torch.float32 and half.shape == x.shape and not half.requires_grad
    torch.testing.assert_close(half.double(), whole(x), rtol=0.05, atol=0.1 * whole(x).std().item())


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_a_constant_map_stays_finite(kind: str) -> None:
    for x in (torch.zeros(2, 8, 3, 3), torch.full((2, 8, 3, 3), 7.0), torch.zeros(1, 8, 1, 1)):
        assert fitted(kind, x)(x).isfinite().all()


def test_what_each_makes_of_the_data() -> None:
    x = maps()
    normed = F.layer_norm(cells(x), (12,), eps=1e-6).view(6, 9, 7, 12).movedim(-1, 1)
    torch.testing.assert_close(fitted("layer", x)(x), normed)
    torch.testing.assert_close(fitted("l2", x)(x).norm(dim=1), torch.ones(6, 9, 7, dtype=torch.float64))
    standard = cells(fitted("channel", x)(x))
    torch.testing.assert_close(standard.mean(0), torch.zeros(12).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(12).double(), atol=1e-5, rtol=0)
    one = fitted("global", x)(x)
    assert one.mean().abs() < 1e-5 and abs(one.std(correction=0) - 1) < 1e-5
    torch.testing.assert_close(one, (x - x.mean()) / x.std(correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [12, 10, 1, 2, 9], ids=lambda c: f"{c} channels")
def test_phi_s_is_an_isotropic_rotation_to_variance_1(channels: int) -> None:
    x = maps(channels)
    made = fitted("phi_s", x)
    y = cells(made(x))
    torch.testing.assert_close(y.mean(0), torch.zeros(channels).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(channels).double(), atol=1e-5, rtol=0)
    distances = torch.cdist(cells(x)[:20], cells(x)[:20])
    ratio = (torch.cdist(y[:20], y[:20]) / distances)[distances > 0]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=0)
    matrix = made.matrix.double()
    back = (y - made.bias) @ matrix / matrix[0].square().sum()  # the inverse of a scaled rotation
    torch.testing.assert_close(back, cells(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 64, 96, 256, 384, 768, 1024, 1152, 1280])
def test_hadamard(size: int) -> None:
    made = hadamard(size)
    assert made is not None and set(made.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(made @ made.mT, size * torch.eye(size, dtype=torch.float64))


def test_where_there_is_no_hadamard_matrix_another_rotation_equalises() -> None:
    assert hadamard(10) is None and hadamard(9) is None and hadamard(3) is None
    for variances in (torch.rand(10), torch.tensor([9.0, 0, 0, 0, 0, 0]), torch.ones(5), torch.zeros(3)):
        spread = variances.double()
        rotation = equalising(spread)
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(len(spread)).double())
        torch.testing.assert_close((rotation.square() @ spread), spread.mean().expand_as(spread))


def gradient_share(kind: str, x: Tensor, channel: int) -> float:
    """Part of the squared gradient of a mean squared error that goes to one channel."""
    student = torch.zeros_like(x, requires_grad=True)
    F.mse_loss(student, fitted(kind, x)(x)).backward()
    squares = student.grad.square().sum((0, 2, 3))
    return (squares[channel] / squares.sum()).item()


def test_a_loud_channel_is_quieted_by_channel_alone() -> None:
    x = torch.randn(4, 32, 8, 8, dtype=torch.float64)
    x[:, 5] *= 1000
    assert gradient_share("channel", x, 5) < 0.05 < 0.9 < gradient_share("global", x, 5)


def test_a_dead_channel_is_not_blown_up() -> None:
    x = torch.randn(4, 8, 8, 8)
    x[:, 3] *= 1e-6
    assert cells(fitted("channel", x)(x))[:, 3].abs().max() < 1e-2


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_the_scale_of_a_teacher_does_not_matter(kind: str) -> None:
    """Two levels, one a thousand times the other: the same targets, but for `clip`, which only clips."""
    x = maps()
    small, large = fitted(kind, x)(x), fitted(kind, 1000 * x)(1000 * x)
    scale, tolerance = (1000, 1e-2) if kind == "clip" else (1, 1e-4)
    torch.testing.assert_close(large / scale, small, rtol=tolerance, atol=1e-4)


def test_clip_cuts_outlier_cells_and_nothing_else() -> None:
    x = torch.randn(4, 32, 16, 16)
    planted = torch.rand(4, 1, 16, 16) < 0.02
    assert planted.any()
    loud = torch.where(planted, 10 * x, x)
    made = fitted("clip", loud)
    clipped = made(loud)
    torch.testing.assert_close(clipped[~planted.expand_as(x)], loud[~planted.expand_as(x)])
    assert clipped.norm(dim=1).max() < 2.5 * x.norm(dim=1).median()
    torch.testing.assert_close(F.cosine_similarity(clipped, loud), torch.ones(4, 16, 16))
    alike = torch.ones(2, 8, 4, 4)
    torch.testing.assert_close(fitted("clip", alike)(alike), alike)


@pytest.mark.parametrize("kind", [name for name, cls in CONDITIONINGS.items() if issubclass(cls, Measured)])
def test_statistics_are_kept_in_the_state_dict(kind: str) -> None:
    x = maps()
    made, other = fitted(kind, x), CONDITIONINGS[kind](12)
    with pytest.raises(InputError, match="has no statistics yet; train, or load a checkpoint"):
        other(x)
    other.load_state_dict(made.state_dict())
    assert torch.equal(made(x), other(x))
