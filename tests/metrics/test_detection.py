"""COCO scores from small tables: hand-made cases, invariances, and both libraries against each other."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from cankd_hf.metrics import detection
from cankd_hf.metrics.detection import PADDING, detection_scores, detection_statistics

NAMES = {0: "cat", 1: "dog", 2: "emu"}
Images = list[dict[str, torch.Tensor]]


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator) * 300
    return torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=generator) ** 2 * 200], 1)


def random_set(images: int, num_labels: int, seed: int = 0, limit: int = 30) -> tuple[Images, Images]:
    """Detections around the objects and elsewhere, and the objects, a few of them crowds; some images are empty."""
    generator = torch.Generator().manual_seed(seed)
    found, there = [], []
    for _ in range(images):
        count = int(torch.randint(0, 12, (1,), generator=generator))
        boxes = random_boxes(count, generator)
        labels = torch.randint(0, num_labels, (count,), generator=generator)
        guesses = random_boxes(limit, generator)
        guessed = torch.randint(0, num_labels, (limit,), generator=generator)
        near = min(2 * count, limit)
        if count:
            which = torch.arange(near) % count
            guesses[:near] = boxes[which] + torch.randn(near, 4, generator=generator) * 2
            guessed[:near] = labels[which]
        scores = torch.randint(0, 20, (limit,), generator=generator) / 20  # many are equal
        found.append({"scores": scores, "labels": guessed, "boxes": guesses})
        crowd = (torch.rand(count, generator=generator) < 0.1).long()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1) * 0.8
        there.append({"class_labels": labels, "boxes": boxes, "area": area, "iscrowd": crowd})
    return found, there


def image(boxes: list[list[float]], labels: list[int], **more: Any) -> dict[str, torch.Tensor]:
    values = {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "class_labels": torch.tensor(labels).long()}
    return values | {key: torch.tensor(value) for key, value in more.items()}


def found(boxes: list[list[float]], labels: list[int], scores: list[float]) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes).float().reshape(-1, 4),
        "labels": torch.tensor(labels).long(),
        "scores": torch.tensor(scores).float(),
    }


def score(guess: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    return detection_scores(detection_statistics([guess], [truth]), NAMES)


BOX, OTHER = [10.0, 10.0, 50.0, 60.0], [100.0, 100.0, 120.0, 115.0]


def test_all_found_is_one_and_what_is_not_there_is_nan() -> None:
    scores = score(found([BOX, OTHER], [0, 1], [0.9, 0.8]), image([BOX, OTHER], [0, 1]))
    assert all(scores[key] == pytest.approx(1) for key in ("ap", "ap50", "ap75", "ar100", "ap_agnostic", "ap_cat"))
    assert scores["ap_small"] == scores["ap_medium"] == 1 and math.isnan(scores["ap_large"])
    assert math.isnan(scores["ap_emu"])


def test_nothing_found_is_zero_and_nothing_there_is_nan() -> None:
    assert score(found([], [], []), image([BOX], [0]))["ap"] == 0
    assert all(math.isnan(value) for value in score(found([BOX], [0], [0.5]), image([], [])).values())
    assert all(math.isnan(value) for value in score(found([], [], []), image([], [])).values())


def test_agnostic_forgives_the_class_alone() -> None:
    scores = score(found([BOX], [1], [0.9]), image([BOX], [0]))
    assert scores["ap"] == 0 and scores["ap_agnostic"] == scores["ap50_agnostic"] == pytest.approx(1)


def test_iou_decides_by_threshold() -> None:
    shifted = [10.0, 10.0, 50.0, 44.0]  # covers 34 of 50 rows: IoU 0.68, good for 0.50, 0.55, 0.60 and 0.65
    scores = score(found([shifted], [0], [0.9]), image([BOX], [0]))
    assert (scores["ap50"], scores["ap75"], scores["ap"]) == pytest.approx((1, 0, 0.4))


def test_a_false_find_before_the_right_one_halves_precision() -> None:
    assert score(found([OTHER, BOX], [0, 0], [0.9, 0.8]), image([BOX], [0]))["ap"] == pytest.approx(0.5)
    assert score(found([OTHER, BOX], [0, 0], [0.7, 0.8]), image([BOX], [0]))["ap"] == pytest.approx(1)


def test_finds_in_a_crowd_are_neither_right_nor_wrong() -> None:
    crowd, inside = [0.0, 0.0, 300.0, 300.0], [200.0, 200.0, 240.0, 240.0]
    guess = found([inside, OTHER, BOX], [0, 0, 0], [0.9, 0.85, 0.8])
    assert score(guess, image([crowd, BOX], [0, 0], iscrowd=[1, 0]))["ap"] == pytest.approx(1)
    assert score(guess, image([BOX], [0]))["ap"] == pytest.approx(1 / 3)


def test_size_is_that_of_the_annotation() -> None:
    scores = score(found([BOX], [0], [0.9]), image([BOX], [0], area=[900.0]))
    assert scores["ap_small"] == 1 and math.isnan(scores["ap_medium"])


def test_the_best_detections_are_kept_and_numbers_that_are_not_finite_are_not() -> None:
    guess = found([OTHER, BOX, BOX, [math.nan, 0.0, 1.0, 1.0]], [0, 0, 0, 0], [0.1, 0.9, math.nan, 0.95])
    table = detection_statistics([guess], [image([BOX], [0])], max_detections=1)
    assert table.shape == (1, 2, 7) and table[0, 0].tolist() == pytest.approx([2, 0, 0.9, *BOX])
    assert detection_scores(table, NAMES)["ap"] == pytest.approx(1)


def test_an_image_that_stands_in_does_not_count() -> None:
    guess, truth = found([OTHER], [0], [0.9]), image([BOX], [0])
    table = detection_statistics([found([BOX], [0], [0.5]), guess], [truth, truth | {"image_id": torch.tensor(-1)}])
    assert (table[1] == PADDING).all() and detection_scores(table, NAMES)["ap"] == pytest.approx(1)


def test_scores_hang_neither_on_order_nor_on_batches_nor_on_padding() -> None:
    """13 images in one process, and dealt out to two that pad to different widths."""
    guesses, truths = random_set(13, 3)
    whole = detection_scores(detection_statistics(guesses, truths), NAMES)
    parts = [detection_statistics(guesses[rank::2], truths[rank::2]) for rank in range(2)]
    widest = max(part.shape[1] for part in parts) + 3
    padded = torch.cat([pad(part, (0, 0, 0, widest - part.shape[1]), value=PADDING) for part in parts])
    assert whole == detection_scores(padded.numpy(), NAMES) == detection_scores(padded.flip(0), NAMES)
    assert 0.1 < whole["ap"] < 0.9


def test_the_trainers_own_padding_is_understood() -> None:
    pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import EvalLoopContainer

    guesses, truths = random_set(9, 3, seed=1)
    container = EvalLoopContainer(do_nested_concat=True, padding_index=-100)
    for start in range(0, 9, 2):
        container.add(detection_statistics(guesses[start : start + 2], truths[start : start + 2]))
    expected = detection_scores(detection_statistics(guesses, truths), NAMES)
    np.testing.assert_equal(detection_scores(container.get_arrays(), NAMES), expected)


def test_pycocotools_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    pytest.importorskip("faster_coco_eval")
    table = detection_statistics(*random_set(10, 3, seed=2))
    fast = detection_scores(table, NAMES)
    monkeypatch.setattr(detection, "_backend", detection._slow_backend)
    slow = detection_scores(table, NAMES)
    assert fast.keys() == slow.keys()
    for key, value in fast.items():
        assert slow[key] == pytest.approx(value, abs=1e-12, nan_ok=True), key


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected statistics \[N, R, 7\]"):
        detection_scores(torch.zeros(2, 5), NAMES)
    with pytest.raises(ValueError, match="expected classes 0..2, got 0..7"):
        score(found([BOX], [7], [0.5]), image([BOX], [0]))
    with pytest.raises(ValueError, match="expected detections for 1 images, got them for 0"):
        detection_statistics([], [image([BOX], [0])])


def test_the_evaluate_metric_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    from cankd_hf.metrics.evaluate_detection import DetectionMetric

    guesses, truths = random_set(4, 3, seed=3)
    lists = [[{key: value.tolist() for key, value in one.items()} for one in many] for many in (guesses, truths)]
    metric = DetectionMetric(cache_dir=str(tmp_path))
    scores = metric.compute(predictions=lists[0], references=lists[1], id2label=NAMES)
    np.testing.assert_equal(scores, detection_scores(detection_statistics(guesses, truths), NAMES))


@pytest.mark.slow
def test_five_thousand_images_take_less_than_a_minute() -> None:
    guesses, truths = random_set(5000, 80, limit=100)
    begin = time.process_time()
    table = torch.cat(
        [
            pad(part, (0, 0, 0, 111 - part.shape[1]), value=PADDING)
            for part in (
                detection_statistics(guesses[start : start + 8], truths[start : start + 8])
                for start in range(0, 5000, 8)
            )
        ]
    )
    detection_scores(table, {index: str(index) for index in range(80)})
    seconds = time.process_time() - begin
    print(f"5000 images x 100 detections: {seconds:.1f} s of processor time, {table.nbytes / 5000:.0f} bytes an image")
    assert seconds < 60 and table.nbytes / 5000 < 5000
