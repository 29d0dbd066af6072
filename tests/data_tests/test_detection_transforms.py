"""Joint transforms of image and boxes: the boxes stay on what they mark; and the collator."""

from __future__ import annotations

import pickle

import pytest
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.collate import EACH, detection_collate, original_objects, original_sizes, without_crowds
from cankd_hf.data.detection.objects import Objects
from cankd_hf.data.detection.transforms import (
    DetectionEvalTransform,
    DetectionTrainTransform,
    RandomScaleCropBoxes,
    size_of_scale_one,
)


def marked(boxes: list[list[int]], height: int = 60, width: int = 80) -> tuple[torch.Tensor, Objects]:
    """A black image with a white block at each box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 255
    corners = torch.tensor(boxes).float().reshape(-1, 4)
    area = (corners[:, 2:] - corners[:, :2]).prod(1)
    return image, Objects(corners, torch.arange(len(boxes)), area, torch.zeros(len(boxes), dtype=torch.int64), 5)


def config(**changes: object) -> DataConfig:
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "scale": [0.5, 2.0]}
    return DataConfig(**(plain | changes))  # type: ignore[arg-type]


def bright(item: dict, margin: float = 0.5) -> list[int]:
    """x0, y0, x1, y1 of what is bright in an item."""
    rows, columns = (item["pixel_values"][0] > margin).nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def corners(item: dict) -> torch.Tensor:
    """Boxes of an item as corners in its pixels."""
    height, width = item["pixel_values"].shape[-2:]
    boxes = item["labels"]["boxes"]
    both = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    return both * torch.tensor([width, height, width, height])


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_size": [48, 64]},
        {"crop_size": [48, 64], "image_size": [30, 90]},
        {"crop_size": [90, 90], "image_size": [64, 64], "keep_aspect": True},
        {"image_size": [50, 70]},
        {"image_size": [40, 70], "keep_aspect": True},
        {},
    ],
)
def test_boxes_stay_on_what_they_mark(changes: dict[str, object]) -> None:
    transform = DetectionTrainTransform(config(**changes))
    image, objects = marked([[30, 20, 50, 44]])
    for seed in range(12):
        torch.manual_seed(seed)
        item = transform(image, objects)
        if "crop_size" in changes:
            assert list(item["pixel_values"].shape[1:]) == changes["crop_size"]
        assert item["labels"]["size"].tolist() == list(item["pixel_values"].shape[1:])
        assert len(item["labels"]["boxes"]) == 1  # every crop holds the centre of an object
        assert (corners(item)[0] - torch.tensor(bright(item))).abs().max() <= 1.01


def test_all_beside_the_boxes_goes_with_them() -> None:
    """Objects that leave the crop leave with class and area; crowds are not learnt."""
    image, objects = marked([[1, 1, 9, 9], [60, 40, 79, 59], [30, 20, 40, 30]])
    objects = Objects(objects.boxes, objects.classes, objects.area, torch.tensor([0, 0, 1]), 5)
    transform = DetectionTrainTransform(config(crop_size=[30, 40], scale=[1.0, 1.0], flip=0.0))
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        labels = transform(image, objects)["labels"]
        found.add(tuple(labels["class_labels"].tolist()))
        for label, area in zip(labels["class_labels"], labels["area"], strict=True):
            assert area == objects.area[label]
    assert {(0,), (1,)} <= found <= {(), (0,), (1,)}


def test_images_without_objects_and_without_labels() -> None:
    image, objects = marked([])
    for transform in (DetectionTrainTransform(config(crop_size=[20, 20])), DetectionEvalTransform(config())):
        labels = transform(image, objects)["labels"]
        assert labels["boxes"].shape == (0, 4) and labels["class_labels"].shape == (0,)
        assert set(transform(image, None)) == {"pixel_values"}


def test_transforms_travel_to_loading_processes() -> None:
    transform = pickle.loads(pickle.dumps(DetectionTrainTransform(config(crop_size=[20, 20], color_jitter=0.1))))
    assert transform(*marked([[1, 1, 9, 9]]))["pixel_values"].shape == (3, 20, 20)


def test_size_of_scale_one() -> None:
    assert size_of_scale_one((480, 640), None, True) == (480, 640)
    assert size_of_scale_one((480, 640), [800, 1333], False) == (800, 1333)
    assert size_of_scale_one((480, 640), [800, 1333], True) == (800, 1066)
    assert size_of_scale_one((640, 480), [800, 1333], True) == (1066, 800)
    assert size_of_scale_one((300, 1000), [800, 1333], True) == (400, 1333)
    assert size_of_scale_one((300, 900), [600, 600], True) == (200, 600)


def test_a_crop_without_boxes_to_keep_is_any_crop() -> None:
    crop = RandomScaleCropBoxes((10, 10), (1.0, 1.0), None, False, [0, 0, 0])
    assert crop(torch.zeros(3, 40, 40, dtype=torch.uint8)).shape == (3, 10, 10)


def test_evaluation_keeps_all_and_pixels_come_back() -> None:
    """Through resize and padding and back: the boxes in pixels of the data set's image."""
    transform = DetectionEvalTransform(config(image_size=[40, 90], keep_aspect=True))
    first, second = marked([[30, 20, 50, 44], [0, 0, 80, 60]]), marked([[3, 50, 9, 81]], 99, 33)
    items = [transform(*first), transform(*second)]
    assert [tuple(item["pixel_values"].shape[1:]) for item in items] == [(40, 53), (90, 30)]
    batch = detection_collate(items)
    assert batch["pixel_values"].shape == (2, 3, 90, 53) and batch["pixel_mask"].shape == (2, 90, 53)
    assert batch["pixel_mask"][0].sum() == 40 * 53 and batch["pixel_mask"][1, :, :30].all()
    assert [label["size"].tolist() for label in batch["labels"]] == [[40, 53], [90, 30]]
    sizes = original_sizes(batch["labels"], 90, 53)
    for label, size, (_, objects) in zip(batch["labels"], sizes, (first, second), strict=True):
        torch.testing.assert_close(original_objects(label, size)["boxes"], objects.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(label["area"], objects.area)


def test_equal_sizes_need_no_mask() -> None:
    transform = DetectionEvalTransform(config(image_size=[40, 40]))
    items = [transform(*marked([[30, 20, 50, 44]])), transform(*marked([]))]
    batch = detection_collate(items)
    assert set(batch) == {"pixel_values", "labels"}
    torch.testing.assert_close(batch["labels"][0]["boxes"], items[0]["labels"]["boxes"])
    assert batch["labels"][0]["orig_size"].tolist() == [60, 80]


def test_crowds_leave_the_labels_of_the_loss() -> None:
    image, objects = marked([[30, 20, 50, 44], [0, 0, 80, 60]])
    objects = Objects(objects.boxes, objects.classes, objects.area, torch.tensor([1, 0]), 5)
    item = DetectionEvalTransform(config())(image, objects)
    (single,) = without_crowds([item["labels"]])
    assert single["class_labels"].tolist() == [1] and single["boxes"].shape == (1, 4) and len(single["size"]) == 2
    assert len(item["labels"]["boxes"]) == 2
    (collated,) = detection_collate([item])["labels"]
    assert collated["class_labels"].tolist() == [1, 0] and len(without_crowds([collated])[0]["boxes"]) == 1
    # A collator that adds an object after ours, as to paste it from another image, keeps it.
    added = {key: torch.cat([value, value[:1]]) if key in EACH else value for key, value in collated.items()}
    assert without_crowds([added])[0]["class_labels"].tolist() == [1, 1]
