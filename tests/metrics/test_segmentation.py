"""Segmentation scores against a confusion matrix written down the slow way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from cankd_hf.metrics.segmentation import prediction_areas, segmentation_areas, segmentation_scores


def confusion_scores(predictions: list[np.ndarray], labels: list[np.ndarray], num_labels: int) -> dict[str, float]:
    """Scores from a K x K matrix filled pixel by pixel."""
    matrix = np.zeros((num_labels, num_labels), dtype=np.int64)
    for prediction, label in zip(predictions, labels, strict=True):
        for found, true in zip(prediction.ravel(), label.ravel(), strict=True):
            if true != 255:
                matrix[true, found] += 1
    ious, recalls = [], []
    for index in range(num_labels):
        union = matrix[index].sum() + matrix[:, index].sum() - matrix[index, index]
        if union:
            ious.append(matrix[index, index] / union)
        if matrix[index].sum():
            recalls.append(matrix[index, index] / matrix[index].sum())
    return {
        "miou": float(np.mean(ious)),
        "pixel_accuracy": float(np.trace(matrix) / matrix.sum()),
        "mean_accuracy": float(np.mean(recalls)),
    }


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(13, 5, 6, 7, generator=generator)
    logits[:, 4] = -100  # class 4 is never predicted, and never labelled
    labels = torch.randint(0, 4, (13, 11, 9), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return logits, labels


def test_equals_confusion_matrix(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    names = {index: f"c{index}" for index in range(5)}
    scores = segmentation_scores(segmentation_areas(logits, labels, 5), names)
    up = interpolate(logits, size=(11, 9), mode="bilinear", align_corners=False).argmax(1)
    expected = confusion_scores(list(up.numpy()), list(labels.numpy()), 5)
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, abs=1e-12), key
    assert math.isnan(scores["iou_c4"])
    assert all(0 <= scores[f"iou_c{index}"] <= 1 for index in range(4))


def test_areas_add_up_over_any_split(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    whole = segmentation_areas(logits, labels, 5)
    parts = [segmentation_areas(logits[rank::2], labels[rank::2], 5) for rank in range(2)]
    assert whole.dtype == torch.int64 and whole.shape == (13, 3, 5)
    assert torch.equal(whole.sum(0), sum(part.sum(0) for part in parts))
    names = {index: str(index) for index in range(5)}
    np.testing.assert_equal(segmentation_scores(whole.numpy(), names), segmentation_scores(whole.sum(0), names))


def test_each_mask_is_scored_on_its_own_grid() -> None:
    logits = torch.randn(2, 3, 4, 4)
    sizes = torch.tensor([[8, 8], [6, 10]])
    labels = torch.full((2, 8, 10), 255)
    labels[0, :8, :8] = torch.randint(0, 3, (8, 8))
    labels[1, :6, :10] = torch.randint(0, 3, (6, 10))
    together = segmentation_areas(logits, labels, 3, label_sizes=sizes)
    for i, (height, width) in enumerate(sizes.tolist()):
        alone = segmentation_areas(logits[i : i + 1], labels[i : i + 1, :height, :width], 3)
        assert torch.equal(together[i : i + 1], alone)


def test_a_label_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="label 7 is neither in 0..2 nor 255"):
        segmentation_areas(torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 7), 3)


def test_ignore_index_may_be_negative_or_a_class() -> None:
    logits = torch.tensor([[[[5.0]], [[0.0]]]])
    assert segmentation_areas(logits, torch.tensor([[[-100]]]), 2, ignore_index=-100).sum() == 0
    assert segmentation_areas(logits, torch.tensor([[[0]]]), 2, ignore_index=0).sum() == 0


def test_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected areas \[..., 3, 2\]"):
        segmentation_scores(torch.zeros(3, 4), {0: "a", 1: "b"})


def test_maps_of_two_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(3, 2\)"):
        prediction_areas(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64), 2)


def test_the_evaluate_metric_gives_the_same(batch: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    from cankd_hf.metrics.evaluate_segmentation import SegmentationMetric

    logits, labels = batch
    names = {index: f"c{index}" for index in range(5)}
    up = interpolate(logits, size=(11, 9), mode="bilinear", align_corners=False).argmax(1)
    metric = SegmentationMetric(cache_dir=str(tmp_path))
    scores = metric.compute(predictions=up.numpy(), references=labels.numpy(), num_labels=5, id2label=names)
    np.testing.assert_equal(scores, segmentation_scores(segmentation_areas(logits, labels, 5), names))
