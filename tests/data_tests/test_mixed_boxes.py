"""Boxes of pictures that are partly pasted into one another."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert

from cankd_hf.data.common.batch import BatchCollator
from cankd_hf.data.common.mixing import Drawn, Shape
from cankd_hf.data.detection.mixing import boxes_below, boxes_pasted, mixed_labels
from cankd_hf.tasks import DetectionTask
from cankd_hf.teachers.mixing import mix_outputs
from cankd_hf.teachers.teacher import TeacherOutput

RECTANGLE = torch.tensor([32.0, 32, 64, 64])
SIZE = (96, 128)


def test_a_box_stays_unless_its_centre_is_hidden_and_is_cut_to_what_is_seen() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0, 20, 20],  # apart
            [40, 40, 60, 60],  # hidden
            [20, 36, 40, 60],  # its right part is hidden in its whole height
            [20, 20, 40, 60],  # a corner is hidden: its outline stays
            [36, 10, 60, 40],  # its lower end is hidden
        ]
    )
    seen, stays = boxes_below(boxes, RECTANGLE)
    assert stays.tolist() == [True, False, True, True, True]
    assert seen[2].tolist() == [20, 36, 32, 60] and seen[3].tolist() == [20, 20, 40, 60]
    assert seen[4].tolist() == [36, 10, 60, 32] and seen[0].tolist() == [0, 0, 20, 20]


def test_a_box_comes_along_with_its_centre_and_half_of_it() -> None:
    boxes = torch.tensor([[40.0, 40, 60, 60], [0, 0, 20, 20], [20, 36, 52, 60], [0, 0, 96, 96]])
    seen, comes = boxes_pasted(boxes, RECTANGLE)
    assert comes.tolist() == [True, False, True, False]  # of the last one a ninth is seen
    assert seen[2].tolist() == [32, 36, 52, 60]


def item(boxes: list[list[float]], classes: list[int], value: float) -> dict[str, object]:
    corners = torch.tensor(boxes).reshape(-1, 4)
    count = len(classes)
    labels = {
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": box_convert(corners, "xyxy", "cxcywh") / torch.tensor([SIZE[1], SIZE[0]] * 2),
        "area": torch.arange(count).float(),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        **{key: torch.tensor(SIZE) for key in ("size", "orig_size")},
    }
    return {"pixel_values": torch.full((3, *SIZE), value), "labels": labels}


def test_labels_follow_the_pictures_of_a_batch_and_its_unlabelled_half_has_none() -> None:
    """Two constant pictures: the paste is exact in pixels, and boxes come along with them."""
    cut = Shape(area=32 * 64 / (96 * 128), aspect=0.5, top=0.5, left=0.5)
    ours, theirs = item([[0, 0, 30, 30], [40, 40, 60, 50]], [0, 1], 1.0), item([[36, 36, 60, 60]], [2], 2.0)
    ours["drawn"] = Drawn(cut=cut)
    bare = [{"pixel_values": torch.full((3, *SIZE), value), "drawn": Drawn(cut=cut)} for value in (3.0, 4.0)]
    task = DetectionTask({0: "a", 1: "b", 2: "c"})
    batch = BatchCollator(task.collate, torch.float32, task.mix_labels)([ours, theirs, *bare])
    partner, top, left, bottom, right = batch.meta["mix"][0].tolist()
    assert partner == 1 and (bottom - top, right - left) == (32, 64)
    assert batch["pixel_values"][0, :, top:bottom, left:right].unique().tolist() == [2.0]
    assert (batch["pixel_values"][0] == 2).sum() == 3 * 32 * 64
    assert batch["labels"][2] is batch["labels"][3] is None
    assert batch.meta["labelled"].tolist() == [True, True, False, False]
    mixed = batch["labels"][0]
    assert mixed["class_labels"].tolist() == [0, 2] and len(mixed["area"]) == 2 and len(mixed["singles"]) == 2
    assert batch["labels"][1]["class_labels"].tolist() == [2]


def test_dense_predictions_are_mixed_by_their_boxes_as_labels_are() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 40, 2, generator=generator) * 0.7
    boxes = torch.cat([corner, corner + 0.02 + 0.25 * torch.rand(2, 40, 2, generator=generator)], -1)
    logits = torch.randn(2, 40, 3, generator=generator)
    dense = {"class_logits": logits, "boxes": boxes, "quality": torch.randn(2, 40, generator=generator)}
    plan = [(1, 32, 32, 64, 64), (-1, 0, 0, 0, 0)]
    mixed = mix_outputs({"teacher": TeacherOutput([], dense=dense)}, torch.tensor(plan), SIZE)["teacher"].dense
    assert mixed is not None
    for name, value in dense.items():
        torch.testing.assert_close(mixed[name][1], value[1])
    labels = [
        {"class_labels": torch.arange(40) + 100 * row, "boxes": box_convert(one, "xyxy", "cxcywh")}
        for row, one in enumerate(boxes)
    ]
    wanted = mixed_labels(labels, plan, SIZE)[0]
    assert wanted is not None
    own, pasted = (wanted["class_labels"] < 100), wanted["class_labels"] >= 100
    assert own.any() and pasted.any()
    for place in wanted["class_labels"][pasted].tolist():
        torch.testing.assert_close(mixed["class_logits"][0, place - 100], logits[1, place - 100])
    there = mixed["class_logits"][0].amax(-1) > -19
    kept = {place % 100 for place in wanted["class_labels"].tolist()}
    assert {place for place, seen in enumerate(there.tolist()) if seen} == kept


@pytest.mark.parametrize("softmax", [False, True])
def test_queries_are_mixed_as_labels_are(softmax: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.cat([torch.rand(2, 30, 2, generator=generator), torch.full((2, 30, 2), 0.1)], -1)
    logits = torch.randn(2, 30, 4, generator=generator)
    plan = [(1, 32, 32, 64, 64), (-1, 0, 0, 0, 0)]
    output = TeacherOutput([], logits=logits, queries={"class_logits": logits, "boxes": centres})
    mixed = mix_outputs({"t": output}, torch.tensor(plan), SIZE, ["t"] if softmax else [])["t"].queries
    assert mixed is not None and mixed["boxes"].shape == (2, 60, 4)
    labels = [{"class_labels": torch.arange(30) + 30 * row, "boxes": one} for row, one in enumerate(centres)]
    wanted = mixed_labels(labels, plan, SIZE)[0]
    assert wanted is not None
    kept = wanted["class_labels"].tolist()
    assert min(kept) < 30 <= max(kept)
    torch.testing.assert_close(mixed["boxes"][0, kept], wanted["boxes"])
    torch.testing.assert_close(mixed["class_logits"][0, kept], logits.flatten(0, 1)[kept])
    others = [place for place in range(60) if place not in kept]
    empty = (
        mixed["class_logits"][0, others].softmax(-1)[:, :-1] if softmax else mixed["class_logits"][0, others].sigmoid()
    )
    assert (empty < 1e-6).all()
    torch.testing.assert_close(mixed["class_logits"][1, :30], logits[1])
