"""Probes of frozen features: what is fitted, how it is scored, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ResNetBackbone, ResNetConfig

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.probe import main
from cankd_hf.probe.features import Frozen, at_cells, batches
from cankd_hf.probe.fit import classifier, held_out, neighbours, regression
from cankd_hf.probe.intervals import interval, resampled
from cankd_hf.probe.kinds import KnnClassification, LinearClassification, LinearDepth, LinearSegmentation, probes_for
from cankd_hf.teachers.load import load_teacher

DRAW = torch.Generator().manual_seed(0)


def test_ridge_regression_is_least_squares_of_unscaled_features() -> None:
    features = torch.randn(200, 4, generator=DRAW) * torch.tensor([1.0, 100.0, 0.01, 1.0]) + 7
    features[:, 3] = 2.5  # constant
    values = features[:, 0] * 3 - features[:, 1] / 50 + 1
    linear = regression(features, values, penalty=1e-10)
    assert torch.allclose(linear(features)[:, 0], values, atol=1e-3)
    assert linear.weight[3] == 0


def test_a_classifier_separates_what_is_separable_and_needs_no_scale() -> None:
    centres = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]) * torch.tensor([1e3, 1e-3])
    labels = torch.arange(300) % 3
    features = centres[labels] + torch.randn(300, 2, generator=DRAW) * torch.tensor([3e2, 3e-4])
    linear = classifier(features, labels, 3, 1e-4)
    assert (linear(features).argmax(1) == labels).float().mean() > 0.99
    as_map = features[:6].T.reshape(2, 2, 3)
    assert torch.allclose(linear.on_map(as_map).flatten(1).T, linear(features[:6]), rtol=1e-3, atol=1e-2)


def test_neighbours_vote_by_similarity() -> None:
    known = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.0, -1.0]])
    votes = neighbours(known, torch.tensor([0, 0, 1, 1]), torch.tensor([[2.0, 0.1], [-3.0, -3.0]]), 2)
    assert votes.argmax(1).tolist() == [0, 1]


def test_the_held_out_fifth_is_of_whole_images() -> None:
    images = torch.arange(10).repeat_interleave(3)
    first, last = held_out(images)
    assert images[last].unique().tolist() == [8, 9] and (first ^ last).all()
    assert held_out(torch.tensor([0, 1]))[1].tolist() == [False, True]


class Coloured(nn.Module):
    """Its map is the picture itself, at a stride of 8."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.pool(pixel_values)


def frozen(size: tuple[int, int] = (32, 32)) -> Frozen:
    return Frozen(load_teacher(Coloured(), **vars(TeacherConfig(model="x", taps=["pool"])) | {"model": None}), size)


def test_masks_that_the_features_tell_are_scored_one_and_void_does_not_count() -> None:
    probe, features = LinearSegmentation(2, 255), frozen()
    masks = [torch.zeros(32, 32, dtype=torch.int64) for _ in range(10)]
    for index, mask in enumerate(masks):
        mask[:, 8 * (1 + index % 3) :] = 1
        mask[:8] = 255
    pictures = torch.stack([torch.where(mask == 1, 1.0, -1.0).expand(3, -1, -1) for mask in masks])
    maps = features(pictures)
    assert maps.shape == (10, 3, 4, 4)
    kept = [probe.features(one, mask, 100, DRAW) for one, mask in zip(maps, masks, strict=True)]
    assert all(len(labels) == 12 for _, labels in kept)  # without the row of void
    probe.fit(*(torch.cat(values) for values in zip(*kept, strict=True)), torch.arange(10).repeat_interleave(12))
    rows = np.stack([probe.statistics(one, mask) for one, mask in zip(maps, masks, strict=True)])
    assert rows[:, 2].sum() == 10 * 24 * 32
    assert probe.score(rows.sum(0)) > 0.75  # cells are as coarse as 8 pixels
    few, _ = probe.features(maps[0], masks[0], 5, DRAW)
    assert len(few) == 5


@pytest.mark.parametrize("kind", [KnnClassification, LinearClassification])
def test_classes_of_images(kind: Any) -> None:
    probe = kind(3, -100)
    maps = torch.randn(30, 5, 2, 2, generator=DRAW) * 0.1
    labels = torch.arange(30) % 3
    maps[torch.arange(30), labels] += 1
    kept = [probe.features(one, int(label), 9, DRAW) for one, label in zip(maps, labels, strict=True)]
    probe.fit(*(torch.cat(values) for values in zip(*kept, strict=True)), torch.arange(30))
    rows = np.stack([probe.statistics(one, int(label)) for one, label in zip(maps, labels, strict=True)])
    assert probe.score(rows.sum(0)) == 1.0
    wrong = np.stack([probe.statistics(one, (int(label) + 1) % 3) for one, label in zip(maps, labels, strict=True)])
    assert probe.score(wrong.sum(0)) == 0.0


def test_depth_of_cells() -> None:
    probe = LinearDepth(0, -100)
    logs = torch.rand(10, 4, 4, generator=DRAW) * 2
    maps = torch.stack([logs, torch.randn(10, 4, 4, generator=DRAW)], 1)
    depths = logs.exp().repeat_interleave(8, 1).repeat_interleave(8, 2)
    depths[:, :8, :8] = 0  # unknown
    kept = [probe.features(one, depth, 100, DRAW) for one, depth in zip(maps, depths, strict=True)]
    assert all(len(labels) == 15 for _, labels in kept)
    probe.fit(*(torch.cat(values) for values in zip(*kept, strict=True)), torch.arange(10).repeat_interleave(15))
    assert torch.allclose(probe.linear.on_map(maps[0])[0], logs[0], atol=0.1)
    rows = np.stack([probe.statistics(one, depth) for one, depth in zip(maps, depths, strict=True)])
    assert rows[:, 0].sum() == 10 * 15 * 64 and probe.score(rows.sum(0)) < 0.3
    assert probe.lower_is_better


def test_probes_follow_from_labels() -> None:
    assert [type(one) for one in probes_for(torch.ones(4, 4), 0, 255)] == [LinearDepth]
    assert [type(one) for one in probes_for(torch.zeros(4, 4, dtype=torch.int64), 2, 255)] == [LinearSegmentation]
    assert [type(one) for one in probes_for(3, 5, -100)] == [KnnClassification, LinearClassification]
    with pytest.raises(InputError, match="got boxes"):
        probes_for({"boxes": torch.zeros(1, 4)}, 2, 255)


def test_intervals_hold_the_mean_and_pairs_are_narrower() -> None:
    draw = np.random.default_rng(3)
    hard = draw.random(200)  # of images, for both models
    one, other = (np.stack([(hard < share).astype(float), np.ones(200)], 1) for share in (0.6, 0.65))
    score = lambda sums: float(sums[0] / sums[1])  # noqa: E731
    drawn = [resampled(rows, score, seed=1) for rows in (one, other)]
    low, high = interval(drawn[0])
    assert low < score(one.sum(0)) < high and high - low == pytest.approx(4 * np.sqrt(0.6 * 0.4 / 200), rel=0.1)
    paired = interval(drawn[1] - drawn[0])
    assert paired[1] - paired[0] < (high - low) / 2
    assert interval(drawn[0] - resampled(one, score, seed=1)) == (0.0, 0.0)


def test_maps_of_one_stride_give_the_last_and_pyramids_all() -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 1, 1], layer_type="basic")
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    read = Frozen(load_teacher(ResNetBackbone(config)), (64, 64))
    assert (read.channels, read.stride, read.grid) == (32, 8.0, (8, 8))
    assert read(torch.zeros(2, 3, 64, 64)).shape == (2, 32, 8, 8)
    assert not read.one and frozen().one


def test_cells_have_the_label_at_their_centre() -> None:
    labels = torch.arange(64).reshape(8, 8)
    assert at_cells(labels, (2, 2)).tolist() == [[18, 22], [50, 54]]
    assert at_cells(torch.full((4, 4), 255), (3, 3)).unique().tolist() == [255]
    samples = [{"pixel_values": torch.zeros(3, 4, 4), "labels": index} for index in range(5)]
    assert [labels for _, labels in batches(samples, 2)] == [[0, 1], [2, 3], [4]]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 1, 1], layer_type="basic")
    for name in ("one", "two"):
        ResNetBackbone(config).save_pretrained(tmp_path / name)
    sizes = "data.generated={train: 12, validation: 4, test: 5, size: 32}"
    words = [str(tmp_path / "one"), "shapes", sizes, "--size", "32", "32", "--json", str(tmp_path / "scores.json")]
    assert main([*words, "--beside", str(tmp_path / "two")]) == 0
    said = capsys.readouterr()
    assert all(word in said.out for word in ("95% intervals", "linear", "32x32", "one", "two"))
    first, second = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert first["model"].endswith("one") and first["beside"] is None
    assert (first["train_images"], first["test_images"], first["size"]) == (12, 5, [32, 32])
    assert first["low"] <= first["score"] <= first["high"]
    assert second["beside"]["score"] == pytest.approx(first["score"] - second["score"])


def test_fewer_training_images_and_damaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 1, 1], layer_type="basic")
    model = ResNetBackbone(config)
    sizes = ["data.generated={train: 20, validation: 4, test: 5, size: 32}", "data.max_train_samples=12"]
    words = [str(tmp_path / "one"), "shapes", *sizes, "--size", "32", "32", "--json", str(tmp_path / "scores.json")]
    model.save_pretrained(tmp_path / "one")
    assert main(words) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["results"][0]["train_images"] == 12
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    model.save_pretrained(tmp_path / "one")
    assert main(words) == 2
    assert "expected finite features" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "probe"), [("depth", "linear depth, AbsRel"), ("classification", "kNN")])
def test_other_labels(task: str, probe: str, tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(tmp_path / "one")
    sizes = "data.generated={train: 12, validation: 4, test: 5, size: 32}"
    words = [str(tmp_path / "one"), "shapes", sizes, "--task", task, "--size", "32", "32"]
    assert main([*words, "--json", str(tmp_path / "scores.json")]) == 0
    results = json.loads((tmp_path / "scores.json").read_text())["results"]
    assert probe in results[0]["probe"] and len(results) == 1 + (task == "classification")
    assert results[0]["lower_is_better"] is (task == "depth") and results[0]["score"] >= 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "segmentatoin"], "did you mean 'segmentation'?"),
        (["--task", "features"], "expected one with labels"),
        (["--size", "4", "4"], "at least 16"),
        (["--limit", "1"], "--limit: expected at least 10"),
        (["--seed", str(2**63)], "--seed: expected less"),
        (["--json", "nowhere/scores.json"], "--json: expected a file that can be written"),
    ],
)
def test_bad_options_are_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(tmp_path / "one")
    assert main([str(tmp_path / "one"), "shapes", *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors and "Traceback" not in errors


def test_what_is_held_out_is_not_fitted_on(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], layer_type="basic")
    ResNetBackbone(config).save_pretrained(tmp_path / "one")
    for number in range(20):
        (tmp_path / "set" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "depth").mkdir(exist_ok=True)
        pixels = np.full((32, 32, 3), 12 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / "images" / f"{number}.png")
        np.save(tmp_path / "set" / "depth" / f"{number}.npy", pixels[..., 0] / 50 + 1)
    file = tmp_path / "scores.json"
    assert main([str(tmp_path / "one"), str(tmp_path / "set"), "--size", "32", "32", "--json", str(file)]) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert (result["train_images"], result["test_images"]) == (18, 2) and "depth" in result["probe"]
