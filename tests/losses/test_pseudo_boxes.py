"""Which of a teacher's detections become labels, which are uncertain, and how much they weigh."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.features.detections import detections_in
from cankd_hf.losses import FocalGlobalLoss
from cankd_hf.losses.pseudo_boxes import PseudoBoxesLoss

Labels = list[dict[str, Tensor] | None]


def labelled(*classes: int) -> dict[str, Tensor]:
    return {"class_labels": torch.tensor(classes, dtype=torch.int64), "boxes": torch.full((len(classes), 4), 0.5)}


def found(rows: list[list[tuple[int, float]]]) -> dict[str, Tensor]:
    """Detections of a class and a score each, one box beside the other."""
    most = max(1, *map(len, rows))
    padded = [row + [(0, 0.0)] * (most - len(row)) for row in rows]
    corner = torch.arange(most)[:, None] / 32
    boxes = torch.cat([corner, corner * 0, corner + 1 / 32, corner * 0 + 0.5], 1).expand(len(rows), most, 4)
    scores, classes = (torch.tensor([[pair[part] for pair in row] for row in padded]) for part in (1, 0))
    return {"scores": scores, "labels": classes, "boxes": boxes}


def test_the_best_part_of_the_expected_objects_of_each_class_become_labels() -> None:
    """Labelled: four of class 0 and one of class 1 in two images; of two others half as many are asked for."""
    loss = PseudoBoxesLoss(3, share=0.5)
    labels: Labels = [labelled(0, 0, 1), labelled(0, 0), None, None]
    scores = [(0, 0.9), (0, 0.4), (1, 0.8), (2, 0.99), (0, 0.02)]
    made, factor, part = loss.choose(found([[], [], scores, [(0, 0.6), (0, 0.3), (1, 0.2)]]), labels)
    assert made[0] is made[1] is None  # these have labels of their own
    # two of class 0 are expected, half a one of class 1, none of class 2
    third, fourth = made[2], made[3]
    assert third is not None and fourth is not None
    assert third["class_labels"].tolist() == [0] and fourth["class_labels"].tolist() == [0]
    torch.testing.assert_close(third["boxes"][0], torch.tensor([1 / 64, 0.25, 1 / 32, 0.5]))
    assert len(third["uncertain"]) == 3 and len(fourth["uncertain"]) == 2  # one is below the floor
    assert factor == pytest.approx(2 / 2.5)
    assert loss.chosen.tolist() == [2, 0, 0]


def test_thresholds_are_those_of_all_images_so_far() -> None:
    loss = PseudoBoxesLoss(1, share=1.0)
    labels: Labels = [labelled(0), None]
    kept = [loss.choose(found([[], [(0, score)]]), labels)[0][1] for score in (0.3, 0.9, 0.5)]
    assert all(one is not None for one in kept)  # one object in each image, and so are the detections
    crowded, *_ = loss.choose(found([[], [(0, 0.2), (0, 0.95), (0, 0.6)]]), labels)
    assert crowded[1] is not None and len(crowded[1]["boxes"]) == 2 and len(crowded[1]["uncertain"]) == 1
    assert loss.thresholds()[0] == 301  # of six detections the best four
    before = {name: value.clone() for name, value in loss.named_buffers()}
    loss.eval().choose(found([[], [(0, 0.9)]]), labels)
    assert all(torch.equal(value, before[name]) for name, value in loss.named_buffers())
    assert set(loss.state_dict()) == set(before)  # a resumed run knows them


def test_an_image_without_a_sure_box_is_left_out_and_few_boxes_weigh_little() -> None:
    loss = PseudoBoxesLoss(1, share=1.0)
    labels: Labels = [labelled(0), None, None]
    made, factor, part = loss.choose(found([[], [], []]), labels)
    assert made == [None, None, None] and factor == 0
    made, factor, part = loss.choose(found([[], [(0, 0.5)], [(0, 0.01)]]), labels)
    assert made[1] is not None and made[2] is None
    assert factor == 0.5 and part == 1  # one box, where two are expected
    made, factor, part = loss.choose(found([[(0, 0.9)]]), [labelled(0)])
    assert made == [None]


def test_flat_boxes_and_low_scores_are_no_objects() -> None:
    loss = PseudoBoxesLoss(1, share=1.0, floor=0.3)
    one = found([[], [(0, 0.5), (0, 0.29)]])
    one["boxes"] = torch.tensor([[[0.1, 0.1, 0.1, 0.5], [0.1, 0.1, 0.4, 0.5]]]).expand(2, 2, 4)
    assert loss.choose(one, [labelled(0), None])[0] == [None, None]


def test_rare_classes_are_told() -> None:
    loss = PseudoBoxesLoss(2, share=1.0)
    labels: Labels = [labelled(0, 1), None]
    for _ in range(8):
        loss.choose(found([[], [(0, 0.9)]]), labels)
    assert loss.rare_classes() == [1]
    told = loss.report()
    assert told["boxes_an_image"] == told["kept/0"] == 1 and told["kept/1"] == 0
    assert "kept/0" not in PseudoBoxesLoss(21).report()


def test_detections_of_dense_predictions_and_of_queries() -> None:
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.52], [0.6, 0.6, 0.9, 0.9]]]).repeat(2, 1, 1)
    logits = torch.tensor([[[2.0, -9], [1.0, -9], [-9, 0.5]], [[-9.0, 3], [-9, -9], [-9, -9]]])
    dense = detections_in({"class_logits": logits, "boxes": boxes}, None, 2)
    # of two boxes of a class that overlap the weaker one goes; what is left of it has a score of 0
    torch.testing.assert_close(dense["scores"][0, :2], torch.tensor([2.0, 0.5]).sigmoid())
    assert dense["labels"][0, :2].tolist() == [0, 1] and dense["labels"][1, 0] == 1
    rated = detections_in({"class_logits": logits, "boxes": boxes, "quality": torch.zeros(2, 3)}, None, 2)
    torch.testing.assert_close(rated["scores"][1, 0], (torch.tensor(3.0).sigmoid() / 2).sqrt())
    centred = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
    queries = detections_in(None, {"class_logits": logits, "boxes": centred}, 2)
    torch.testing.assert_close(queries["scores"][0, :3], torch.tensor([2.0, 1, 0.5]).sigmoid())
    torch.testing.assert_close(queries["boxes"][1, 0], boxes[1, 0])
    softmax = detections_in(None, {"class_logits": torch.cat([logits, logits[..., :1]], -1), "boxes": centred}, 2)
    torch.testing.assert_close(softmax["scores"][1, 0], torch.tensor([-9.0, 3, -9]).softmax(0)[1])


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="share"):
        PseudoBoxesLoss(3, share=0.0)
    with pytest.raises(InputError, match="gives no boxes"):
        detections_in(None, None, 3)


def test_focal_global_takes_an_image_without_labels_as_one_region() -> None:
    """Not as one without objects, which would be background alone."""
    loss = FocalGlobalLoss(4).eval()
    student, teacher = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    label = {"boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    parts = loss(student[:1], teacher[:1], labels=[label]) + loss(student[1:], teacher[1:])
    torch.testing.assert_close(loss(student, teacher, labels=[label, None]), parts / 2)
    torch.testing.assert_close(loss(student, teacher, labels=[None, None]), loss(student, teacher))
