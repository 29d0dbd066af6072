"""Masks stay with their boxes and their picture through every transform, and in mixed pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.mixing import paste
from cankd_hf.data.detection.collate import detection_collate
from cankd_hf.data.detection.masks import boxes_of, run_length_rows, run_lengths_in
from cankd_hf.data.detection.mixing import mixed_labels
from cankd_hf.data.detection.objects import Objects
from cankd_hf.data.detection.transforms import DetectionEvalTransform, DetectionTrainTransform
from cankd_hf.run_lengths import encoded

HEIGHT, WIDTH = 80, 120
WHITE: dict[str, Any] = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {"flip": 0.0, "scale": [1.0, 1.0]},
    "flipped": {"flip": 1.0, "scale": [1.0, 1.0]},
    "scaled": {"scale": [0.5, 2.0]},
    "stretched": {"image_size": [96, 96], "scale": [0.7, 1.5]},
    "fitted": {"image_size": [96, 96], "keep_aspect": True},
    "cropped": {"crop_size": [64, 64], "scale": [0.5, 2.0]},
    "cropped and stretched": {"crop_size": [64, 96], "image_size": [64, 64], "scale": [0.3, 3.0]},
}


def bright() -> tuple[Tensor, Objects]:
    """A black picture [3, H, W] whose three objects are bright in a channel of their own: a cross, a box, an L."""
    masks = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 10:40, 20:30] = masks[0, 20:30, 10:45] = True
    masks[1, 50:70, 60:90] = True
    masks[2, 5:45, 70:76] = masks[2, 39:45, 70:110] = True
    count = torch.zeros(3, dtype=torch.int64)
    area = masks.flatten(1).sum(1).float()
    outlines = tuple(encoded(masks.numpy()))
    return masks.to(torch.uint8) * 255, Objects(
        boxes_of(masks), torch.arange(3), area, count, 0, outlines=outlines, size=(HEIGHT, WIDTH)
    )


def aligned(picture: Tensor, label: dict[str, Tensor], loose: float) -> int:
    """Asserts that masks cover what is bright, and boxes what masks cover; returns how many there are."""
    height, width = picture.shape[-2:]
    boxes = box_convert(label["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
    assert label["masks"].dtype == torch.bool and label["masks"].shape[1:] == (height, width)
    assert len(label["masks"]) == len(boxes) == len(label["class_labels"])
    for mask, box, kind in zip(label["masks"], boxes, label["class_labels"].tolist(), strict=True):
        seen = picture[kind] > 0.5
        assert (mask ^ seen).sum() <= loose * (2 + mask.sum() ** 0.5), "the mask is where the object is"
        assert mask.any()
        torch.testing.assert_close(box, boxes_of(mask[None])[0], atol=2.1 if loose else 1e-3, rtol=0)
    return len(boxes)


@pytest.mark.parametrize("kind", CHANGES)
def test_masks_boxes_and_picture_stay_together(kind: str) -> None:
    transform = DetectionTrainTransform(DataConfig(**{"color_jitter": 0.0, **WHITE, **CHANGES[kind]}))
    torch.manual_seed(0)
    exact = kind in ("as it is", "flipped")
    counts = []
    for _ in range(40):
        item = transform(*bright())
        counts.append(aligned(item["pixel_values"], item["labels"], 0.0 if exact else 4.0))
    assert max(counts) == 3 and sum(counts) >= 40, "an object at least is seen in each"


def test_boxes_of_cropped_masks_are_those_of_what_is_left() -> None:
    """A crop can cut the part of a mask that made its box wide, as of an L."""
    picture, objects = bright()
    transform = DetectionTrainTransform(
        DataConfig(**{"color_jitter": 0.0, "flip": 0.0, "crop_size": [32, 32], "scale": [1.0, 1.0], **WHITE})
    )
    torch.manual_seed(1)
    tighter = 0
    for _ in range(60):
        label = transform(picture, objects)["labels"]
        boxes = box_convert(label["boxes"], "cxcywh", "xyxy") * 32
        torch.testing.assert_close(boxes, boxes_of(label["masks"]))
        tighter += int(((boxes[:, 2:] - boxes[:, :2]).amin(1) <= 6).sum())
    assert tighter


def test_an_object_of_whose_mask_nothing_is_left_is_dropped() -> None:
    picture, objects = bright()
    corner = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    corner[0, 0, 0] = corner[0, -1, -1] = True  # its box is the whole picture
    both = torch.cat([objects.masks().bool(), corner])
    made = Objects(
        *(boxes_of(both), torch.arange(4) % 3, torch.ones(4), torch.zeros(4, dtype=torch.int64), 0),
        outlines=tuple(encoded(both.numpy())),
        size=(HEIGHT, WIDTH),
    )
    transform = DetectionTrainTransform(DataConfig(crop_size=[40, 40], scale=[1.0, 1.0], flip=0.0))
    torch.manual_seed(0)
    found = [transform(picture, made)["labels"] for _ in range(20)]
    assert all(label["masks"].flatten(1).any(1).all() for label in found)
    assert min(len(label["masks"]) for label in found) < 3


def test_evaluation_keeps_crowds_and_the_masks_of_the_data_set() -> None:
    picture, objects = bright()
    crowd = Objects(
        *(objects.boxes, objects.classes, objects.area, torch.tensor([0, 1, 0]), 0),
        outlines=objects.outlines,
        size=objects.size,
    )
    label = DetectionEvalTransform(DataConfig(image_size=[40, 60], **WHITE))(picture, crowd)["labels"]
    assert label["masks"].shape == (3, 40, 60)
    assert tuple(run_lengths_in(label["outlines"])) == objects.outlines
    batch = detection_collate(
        [{"pixel_values": torch.zeros(3, 48, 64), "labels": label | {"size": torch.tensor([40, 60])}}]
    )
    (made,) = batch["labels"]
    assert made["iscrowd"].tolist() == [0, 0, 1] and made["masks"].shape == (3, 48, 64)
    assert run_lengths_in(made["outlines"])[2] == (objects.outlines or ())[1]
    assert (made["masks"][2, :40, :60] == label["masks"][1]).all() and not made["masks"][:, 40:].any()


def test_mixed_pictures() -> None:
    """What is pasted brings its masks; what lies below loses what is hidden, and goes if that is most of it."""
    transform = DetectionEvalTransform(DataConfig(**WHITE))
    items = [transform(*bright()) for _ in range(2)]
    items[1]["pixel_values"] = items[1]["pixel_values"].flip(-1)
    label = items[1]["labels"]
    label["masks"] = label["masks"].flip(-1)
    label["boxes"] = label["boxes"] * torch.tensor([-1.0, 1, 1, 1]) + torch.tensor([1.0, 0, 0, 0])
    batch = detection_collate(items)
    plan = [(1, 0, 0, 80, 56), (-1, 0, 0, 0, 0)]
    mixed = mixed_labels(batch["labels"], plan, (HEIGHT, WIDTH))
    picture = paste(batch["pixel_values"], plan)[0]
    first = mixed[0]
    assert first is not None and "outlines" not in first
    kinds = first["class_labels"]
    assert sorted(kinds.tolist()) == [1, 1, 2, 2], (
        "the cross is hidden; the box and the L stay, and come from the other"
    )
    for kind in (1, 2):
        assert (first["masks"][kinds == kind].any(0) == (picture[kind] > 0.5)).all()
    boxes = box_convert(first["boxes"], "cxcywh", "xyxy") * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    torch.testing.assert_close(boxes, boxes_of(first["masks"]))
    assert mixed[1] is batch["labels"][1]


def test_boxes_around_masks() -> None:
    masks = torch.rand(50, 7, 9) > 0.9
    masks[0] = False
    for mask, box in zip(masks, boxes_of(masks).tolist(), strict=True):
        rows, columns = torch.where(mask)
        naive = (
            [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            if len(rows)
            else 4 * [0]
        )
        assert box == naive
    assert boxes_of(torch.zeros(0, 5, 5)).shape == (0, 4)
    assert run_length_rows([]).shape == (0, 0) and run_lengths_in(run_length_rows([b"12", b"345"])) == [b"12", b"345"]
