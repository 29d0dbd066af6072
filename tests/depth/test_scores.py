"""Scores of depth: as written out, the same however the images are shared out, and aligned where they are relative."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cankd_hf.metrics.depth import aligned, depth_scores, depth_sums, image_abs_rel


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    depth = torch.rand(4, 12, 10, generator=generator) * 6 + 0.4
    predicted = depth * (1 + 0.3 * torch.randn(4, 12, 10, generator=generator)).clamp(min=0.2)
    depth[0, :5], depth[2, 3, 3] = 0, torch.nan
    depth[3] = 0
    return predicted, depth


def test_scores_are_those_of_all_pixels() -> None:
    predicted, depth = scene()
    known = (depth > 0) & torch.isfinite(depth)
    p, d = predicted[known].double().numpy(), depth[known].double().numpy()
    ratio = np.maximum(p / d, d / p)
    wanted = {
        "abs_rel": np.mean(np.abs(p - d) / d),
        "sq_rel": np.mean((p - d) ** 2 / d),
        "rmse": np.sqrt(np.mean((p - d) ** 2)),
        "rmse_log": np.sqrt(np.mean((np.log(p) - np.log(d)) ** 2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(d))),
        **{f"delta{power}": np.mean(ratio < 1.25**power) for power in (1, 2, 3)},
    }
    found = depth_scores(depth_sums(predicted, depth))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    each = image_abs_rel(depth_sums(predicted, depth).numpy())
    assert np.isnan(each[3]) and found["image_abs_rel"] == pytest.approx(np.mean(each[:3]))


def test_scores_do_not_depend_on_how_images_are_shared_out() -> None:
    predicted, depth = scene()
    whole = depth_sums(predicted, depth)
    parts = torch.cat([depth_sums(predicted[place : place + 1], depth[place : place + 1]) for place in (0, 1, 2, 3)])
    assert torch.equal(whole, parts) and depth_scores(whole) == depth_scores(parts.numpy())
    # of two sizes, padded to one
    small = depth_sums(predicted[:1, :6, :8], depth[:1, :6, :8])
    sizes = np.array([[6, 8], [12, 10]])
    padded = depth_sums(predicted[:2], depth[:2], label_sizes=sizes)
    assert padded.shape == (2, 9) and torch.equal(padded[1], whole[1]) and padded[0, 0] == small[0, 0]


def test_nothing_to_score_is_nan() -> None:
    scores = depth_scores(depth_sums(torch.ones(1, 4, 4), torch.zeros(1, 4, 4)))
    assert all(np.isnan(value) for value in scores.values())
    with pytest.raises(ValueError, match=r"expected sums \[\.\.\., 9\]"):
        depth_scores(np.zeros((3, 4)))


def test_relative_depth_is_aligned_to_each_image() -> None:
    _, depth = scene()
    truth = depth[:3]
    inverse = torch.stack([(2 + image) / torch.where(one > 0, one, 1) + 7 * image for image, one in enumerate(truth)])
    scores = depth_scores(depth_sums(inverse, truth, relative=True))
    assert scores["abs_rel"] < 1e-5 and scores["delta1"] == 1
    # against numpy's least squares, with noise
    noisy = inverse[1].double() + 0.2 * torch.randn(12, 10, generator=torch.Generator().manual_seed(0)).double()
    known = (truth[1] > 0) & torch.isfinite(truth[1])
    matrix = np.stack([noisy[known].numpy(), np.ones(int(known.sum()))], 1)
    scale, shift = np.linalg.lstsq(matrix, 1 / truth[1][known].double().numpy(), rcond=None)[0]
    wanted = 1 / (scale * noisy + shift).clamp(min=1 / 20)
    torch.testing.assert_close(aligned(noisy, truth[1].double(), known, 20.0), wanted)
    flat = depth_sums(torch.full((1, 12, 10), 5.0), truth[1:2], relative=True)
    assert torch.isfinite(flat).all()


def test_predictions_stop_at_the_limit() -> None:
    sums = depth_sums(torch.full((1, 2, 2), 100.0), torch.full((1, 2, 2), 10.0), limit=10.0)
    assert depth_scores(sums)["abs_rel"] == 0
