"""The numbers behind the figures."""

from __future__ import annotations

import pytest
import torch

from cankd_hf.figures.maps import activation, difference, effective_keys, pca_colours
from cankd_hf.losses import CanKDLoss, InstanceMSELoss


def test_activation_is_the_scaled_mean_of_absolute_values() -> None:
    feature_map = torch.zeros(3, 4, 5)
    feature_map[1, 2, 3] = -6.0
    feature_map[:, 0, 0] = 1.0
    found = activation(feature_map)
    assert found[2, 3] == 1 and found.min() == 0
    assert found[0, 0] == pytest.approx(0.5)  # a mean of 1 against one of 6 / 3
    assert activation(torch.ones(3, 4, 5)).max() == 0
    assert torch.equal(activation(10 * feature_map), found)


def test_the_difference_is_what_the_losses_sum() -> None:
    student, teacher = torch.randn(2, 1, 8, 6, 7)
    raw = difference(student[0], teacher[0])
    assert raw.mean().item() == pytest.approx(InstanceMSELoss(8)(student, teacher).item(), rel=1e-5)
    loss = CanKDLoss(8)
    torch.nn.init.constant_(loss.output_norm.weight, 5.0)
    loss.eval()
    through = difference(loss.transform(student, teacher)[0].detach(), teacher[0])
    assert through.mean().item() == pytest.approx(loss(student, teacher).item(), rel=1e-5)
    assert abs(through.mean() - raw.mean()) > 0.05  # the block does something, and it is seen
    assert difference(3 * teacher[0] + 2, teacher[0]).max() < 1e-4


@pytest.mark.parametrize("shape", [(8, 6, 7), (64, 3, 4), (2, 5, 5)])
def test_equal_maps_have_equal_colours_whatever_the_scale_of_their_channels(shape: tuple[int, ...]) -> None:
    teacher = torch.randn(shape)
    scale, shift = torch.rand(2, shape[0], 1, 1) + 0.5
    reference, same, other = pca_colours(teacher, teacher * scale + shift, torch.randn(shape))
    assert reference.shape == (*shape[1:], 3) and reference.min() >= 0 and reference.max() <= 1
    torch.testing.assert_close(same, reference, atol=1e-3, rtol=0)
    assert (other - reference).abs().mean() > 0.05


def test_colours_are_the_main_directions() -> None:
    """A map of two halves: its first component tells them apart."""
    half = torch.zeros(1, 6, 6)
    half[:, :, 3:] = 1
    teacher = half.repeat(5, 1, 1) + 0.01 * torch.randn(5, 6, 6)
    red = pca_colours(teacher)[0][..., 0]
    assert (red[:, :3] < 0.1).all() and (red[:, 3:] > 0.9).all()


def test_effective_keys() -> None:
    assert effective_keys(torch.full((4, 5), 0.05)) == pytest.approx(20)
    one = torch.zeros(4, 5)
    one[2, 2] = 1
    assert effective_keys(one) == pytest.approx(1)
