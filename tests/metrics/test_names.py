"""Names of the scores of classes: one for each, whatever the classes are called."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cankd_hf.metrics.detection import detection_scores, detection_statistics
from cankd_hf.metrics.names import class_keys
from cankd_hf.metrics.segmentation import segmentation_scores
from cankd_hf.training.monitoring.trackers import grouped

ODD = [
    "mIoU",
    "loss",
    "miou",
    "road sign",
    "road_sign",
    "road sign",
    "",
    "",
    "7",
    "a/b",
    "Straße",
    "道路",
    "a_class_2",
]
SCORES = ["small", "medium", "large", "agnostic", "50", "small_class_0", "a", "a", "a_class_6"]


def test_plain_names_stay() -> None:
    assert class_keys("iou", {1: "car", 0: "road sign", 2: "road_sign"}) == {
        0: "iou_road sign",
        1: "iou_car",
        2: "iou_road_sign",
    }


@pytest.mark.parametrize("names", [ODD, SCORES, ["", "_class_0", ""], ["x", "x", "x_class_0", "x_class_0_class_0"]])
def test_every_class_has_a_name_of_its_own(names: list[str]) -> None:
    id2label = dict(enumerate(names))
    keys = class_keys("ap", id2label, ["ap", "ap_small", "ap_agnostic"])
    assert list(keys) == list(id2label)
    assert len(set(keys.values()) | {"ap", "ap_small", "ap_agnostic"}) == len(names) + 3
    assert all(keys[i].startswith(f"ap_{name}") for i, name in id2label.items())


def test_segmentation_keeps_each_class() -> None:
    id2label = dict(enumerate(ODD))
    areas = np.stack([[i, 10, 10] for i in range(len(ODD))], axis=1)
    scores = segmentation_scores(areas, id2label)
    assert len(scores) == 3 + len(ODD)
    assert list(scores.values())[3:] == [i / (20 - i) for i in range(len(ODD))]
    assert scores["miou"] == pytest.approx(np.mean(list(scores.values())[3:]))


def test_detection_keeps_each_class() -> None:
    boxes = torch.tensor([[0.0, 0, 40, 40]])
    images = range(len(SCORES))
    truth = [{"class_labels": torch.tensor([i]), "boxes": boxes} for i in images]
    found = [{"labels": torch.tensor([i]), "scores": torch.ones(1) / 2, "boxes": boxes} for i in images if i % 2]
    none = {"labels": torch.zeros(0), "scores": torch.zeros(0), "boxes": torch.zeros(0, 4)}
    given = [found[i // 2] if i % 2 else none for i in images]
    plain = detection_scores(detection_statistics(given, truth), {i: f"class {i}" for i in images})
    scores = detection_scores(detection_statistics(given, truth), dict(enumerate(SCORES)))
    assert len(scores) == len(plain)
    for one, two in zip(scores.values(), plain.values(), strict=True):
        assert one == two or (math.isnan(one) and math.isnan(two))
    assert scores["ap_medium"] == plain["ap_medium"] and scores["ap_medium_class_1"] == plain["ap_class 1"] == 1
    assert scores["ap50"] == plain["ap50"] and scores["ap_50"] == plain["ap_class 4"] == 0


def test_trackers_keep_each_class() -> None:
    logs = {"eval_iou_road sign": 1.0, "eval_iou_road_sign": 2.0, "eval_iou_road-sign": 3.0, "loss": 4.0}
    named = grouped(logs)
    assert list(named.values()) == [1.0, 2.0, 3.0, 4.0]
    assert list(named) == ["eval/iou_road sign", "eval/iou_road_sign_2", "eval/iou_road-sign", "train/loss"]
