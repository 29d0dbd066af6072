"""Scoring in another form than `argmax` and `bincount` of each image: the same counts, and no waiting on a device."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from cankd_hf.metrics import segmentation
from cankd_hf.metrics.segmentation import likeliest, prediction_areas, segmentation_areas, segmentation_scores
from cankd_hf.tasks.segmentation import SegmentationTask

NAMES = {0: "a", 1: "b", 2: "c"}


def plain_areas(logits: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_index: int) -> torch.Tensor:
    """The counts by `argmax` and one comparison for each class."""
    resized = interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    found, counted = resized.argmax(1), labels != ignore_index
    rows = [
        torch.stack([(a & b & counted).sum((1, 2)) for a, b in ((p & t, p), (p, p), (t, t))], 1)
        for p, t in ((found == label, labels == label) for label in range(num_labels))
    ]
    return torch.stack(rows, 2)


@pytest.mark.parametrize("classes", [1, 2, 11, 256, 257, 300])
@pytest.mark.parametrize("kind", ["random", "ties", "nan", "infinite"])
def test_likeliest_is_argmax(classes: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "BLOCK", 64)  # several blocks, the last one smaller
    monkeypatch.setattr(segmentation, "GROUP", 19 * 17 * 7)  # and several groups of classes
    logits = torch.randn(classes, 19, 17, generator=torch.Generator().manual_seed(classes))
    if kind == "ties":
        logits = logits.round()
    elif kind == "nan":
        logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.02] = float("nan")
    elif kind == "infinite":
        logits = torch.where(logits < 0.5, -torch.inf, logits)
        logits[:, :4] = -torch.inf
    found = likeliest(logits, (19, 17))
    assert torch.equal(found.long(), logits.argmax(0))
    if kind != "nan":
        assert found.dtype == (torch.uint8 if classes <= 256 else torch.int16)


@pytest.mark.parametrize("classes", [1, 3, 200])
@pytest.mark.parametrize("ignore_index", [255, -100, 0])
@pytest.mark.parametrize("size", [(6, 7), (23, 18)])
def test_counts_equal_the_plain_form(classes: int, ignore_index: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(3, classes, 6, 7, generator=generator).round(decimals=1)
    labels = torch.randint(0, classes, (3, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = ignore_index
    for given in (logits, logits.to(memory_format=torch.channels_last), logits.bfloat16()):
        expected = plain_areas(given, labels, classes, ignore_index)
        assert torch.equal(segmentation_areas(given, labels, classes, ignore_index), expected)


def test_a_prediction_of_no_class_is_an_error_and_the_one_after_the_last_is_wrong() -> None:
    labels = torch.tensor([[0, 1, 255]])
    assert prediction_areas(torch.tensor([[2, 1, 2]]), labels, 2).tolist() == [[0, 1], [0, 1], [1, 1]]
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=r"predictions in 0..1, got .*\b3\b|predictions in 0..1, got .*-1"):
            prediction_areas(torch.tensor([[wrong, 1, 0]]), labels, 2)


def test_an_evaluation_step_waits_for_no_device() -> None:
    """A tensor on the meta device has no values: whatever reads one on the host raises, as it would wait for a GPU."""
    task = SegmentationTask(NAMES)
    logits = torch.randn(4, 3, 5, 6, device="meta")
    inputs = {"pixel_values": torch.randn(4, 3, 9, 8, device="meta"), "labels": torch.zeros(4, 9, 8).long().to("meta")}
    assert set(task.model_inputs(inputs)) == set(inputs)
    labels, count = task.counted_labels(inputs["labels"])
    assert labels.is_meta and count is not None and count.is_meta
    areas = task.statistics({"logits": logits}, inputs, None)  # type: ignore[arg-type]
    assert areas.is_meta and areas.shape == (4, 3, 3) and areas.dtype == torch.int64
    with pytest.raises((RuntimeError, NotImplementedError)):
        areas.sum().item()  # the test would notice


def test_masks_of_one_size_need_no_sizes_read_from_the_device() -> None:
    task = SegmentationTask(NAMES)
    sample = {"pixel_values": torch.zeros(3, 4, 4), "labels": torch.zeros(8, 9, dtype=torch.int64)}
    assert set(task.collate([sample, sample])) == {"pixel_values", "labels"}
    taller = {**sample, "labels": torch.zeros(10, 9, dtype=torch.int64)}
    assert task.collate([sample, taller])["label_sizes"].tolist() == [[8, 9], [10, 9]]


class _Device(torch.Tensor):
    """A tensor that says it is not on the CPU, so that the form of accelerators runs here with values."""

    is_cpu = False  # type: ignore[assignment]


def test_the_form_of_accelerators_counts_the_same_and_marks_wrong_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, labels = (torch.randint(0, 3, (9, 8), generator=generator) for _ in range(2))
    labels[0] = 255
    found = prediction_areas(prediction.as_subclass(_Device), labels.as_subclass(_Device), 3)
    assert torch.equal(found.as_subclass(torch.Tensor), prediction_areas(prediction, labels, 3))
    labels[1, 1] = 7
    wrong = prediction_areas(prediction.as_subclass(_Device), labels.as_subclass(_Device), 3)
    sums = wrong.as_subclass(torch.Tensor) + 10**9
    with pytest.raises(ValueError, match=r"neither in 0..2 nor the one that is ignored"):
        segmentation_scores(sums, NAMES)
