"""Cascade R-CNN against a naive re-derivation: matching, regression targets, losses, refinement and detections."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, nms

from cankd_hf.models.fpn.cascade_cankd_fpn import STAGES, CascadeRCNNDetector, cascade_losses

from .detectors import detector, pictures

HEIGHT, WIDTH = 128, 192
FEW = 60  # proposals of an image: all of them are sampled, whatever the random numbers


@pytest.fixture(scope="module")
def cascade() -> Any:
    torch.manual_seed(0)
    model = detector("cascade_rcnn_resnet", fpn_channels=16, score_threshold=0.0).eval()
    with torch.no_grad():  # an untrained head says the same of everything
        for name, parameter in model.head.named_parameters():
            parameter.mul_(3 if parameter.ndim > 1 and "stages" not in name else 2)
    for mode in ("training", "testing"):
        model.head.rpn._post_nms_top_n[mode] = FEW
    return model


def overlap(one: Tensor, other: Tensor) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return float(both / (areas[0] + areas[1] - both))


def shift_to(box: Tensor, truth: Tensor, scales: tuple[float, ...]) -> list[float]:
    (x, y, w, h), (u, v, a, b) = (box_convert(one[None], "xyxy", "cxcywh")[0].tolist() for one in (box, truth))
    raw = [(u - x) / w, (v - y) / h, math.log(a / w), math.log(b / h)]
    return [value * scale for value, scale in zip(raw, scales, strict=True)]


def shifted(box: Tensor, shift: Tensor, scales: tuple[float, ...]) -> list[float]:
    x, y, w, h = box_convert(box[None], "xyxy", "cxcywh")[0].tolist()
    dx, dy, dw, dh = (value / scale for value, scale in zip(shift.tolist(), scales, strict=True))
    x, y = x + dx * w, y + dy * h
    w, h = w * math.exp(min(dw, math.log(1000 / 16))), h * math.exp(min(dh, math.log(1000 / 16)))
    found = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    return [min(max(value, 0), side) for value, side in zip(found, (WIDTH, HEIGHT, WIDTH, HEIGHT), strict=True)]


def classified(head: CascadeRCNNDetector, stage: int, maps: Any, images: ImageList, boxes: list[Tensor]) -> Any:
    return head._classify(head.stages[stage], maps, images, boxes)


@torch.no_grad()
def test_losses(cascade: Any) -> None:
    images, labels = pictures(2, HEIGHT, WIDTH)
    got = cascade(images, labels=labels).loss_dict
    head, maps = cascade.head, cascade.pyramid(images)
    listed = ImageList(images.new_empty(0, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)] * 2)
    targets = cascade.targets(labels, 2, (HEIGHT, WIDTH))
    torch.manual_seed(0)
    proposals, _ = head._propose(maps, listed, None)
    assert all(1 < len(one) <= FEW for one in proposals)
    for number, (least, scales, weight) in enumerate(STAGES):
        taken, classes, wanted = [], [], []
        for given, target in zip(proposals, targets, strict=True):
            boxes = torch.cat([given, target["boxes"]])
            for box in boxes:
                values = [overlap(box, truth) for truth in target["boxes"]]
                best = max(range(len(values)), key=lambda index: values[index])
                is_object = values[best] >= least
                classes.append(int(target["labels"][best]) + 1 if is_object else 0)
                wanted.append(shift_to(box, target["boxes"][best], scales) if is_object else [0.0] * 4)
            taken.append(boxes)
        assert 0 < sum(label > 0 for label in classes) < len(classes)
        logits, regression = classified(head, number, maps, listed, taken)
        class_loss, box_loss = 0.0, 0.0
        for row, label in enumerate(classes):
            class_loss -= float(logits[row].log_softmax(0)[label]) / len(classes)
            for mine, theirs in zip(regression[row].tolist(), wanted[row], strict=True):
                apart = abs(mine - theirs)
                part = apart**2 / 2 if apart < 1 else apart - 0.5
                box_loss += part / len(classes) if label else 0.0
        assert got[f"loss_classifier_{number + 1}"] == pytest.approx(weight * class_loss, rel=1e-3)
        assert got[f"loss_box_reg_{number + 1}"] == pytest.approx(weight * box_loss, rel=1e-3)
        shifts = iter(regression)
        proposals = []
        for boxes, target in zip(taken, targets, strict=True):
            refined = torch.tensor([shifted(box, next(shifts), scales) for box in boxes])
            proposals.append(refined[: len(boxes) - len(target["boxes"])])
    assert got.keys() == {"loss_objectness", "loss_rpn_box_reg"} | {
        f"loss_{kind}_{number}" for kind in ("classifier", "box_reg") for number in (1, 2, 3)
    }


def test_detections(cascade: Any) -> None:
    images, _ = pictures(1, HEIGHT, WIDTH)
    with torch.no_grad():
        output = cascade(images)
        (got,) = cascade.post_process_object_detection(output, 0.0, [(HEIGHT, WIDTH)])
        head, maps = cascade.head, cascade.pyramid(images)
        listed = ImageList(images.new_empty(0, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)])
        torch.manual_seed(0)
        boxes = head._propose(maps, listed, None)[0][0]
        rated = []
        for number, (_, scales, _) in enumerate(STAGES):
            logits, regression = classified(head, number, maps, listed, [boxes])
            rated.append(logits.softmax(1))
            boxes = torch.tensor([shifted(*pair, scales) for pair in zip(boxes, regression, strict=True)])
    mean = sum(rated) / 3
    found = []
    big = (boxes[:, 2:] - boxes[:, :2] >= 1e-2).all(1)
    for label in range(1, mean.shape[1]):
        scores = mean[big, label]
        kept = nms(boxes[big], scores, 0.5)
        found += [(float(scores[index]), label - 1, boxes[big][index]) for index in kept]
    found = sorted(found, key=lambda one: -one[0])[:100]
    assert len(got["scores"]) == len(found) > 10
    torch.testing.assert_close(got["scores"], torch.tensor([score for score, _, _ in found]), atol=1e-4, rtol=1e-3)
    assert got["labels"].tolist() == [label for _, label, _ in found]
    torch.testing.assert_close(got["boxes"], torch.stack([box for *_, box in found]), atol=1e-2, rtol=1e-3)


def test_no_boxes_give_no_nan() -> None:
    empty = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 4, requires_grad=True)
    for loss in cascade_losses(*empty, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)):
        loss.backward()
        assert loss == 0
    model = detector("cascade_rcnn_resnet")
    images, _ = pictures(2)
    none = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    output = model(images, labels=[none, none])
    output.loss.backward()
    assert output.loss.isfinite() and output.loss_dict["loss_box_reg_3"] == 0


def test_later_stages_learn_from_boxes_the_earlier_ones_refined(cascade: Any) -> None:
    """The gradient of a stage's loss stays in that stage's head and what lies before the proposals."""
    images, labels = pictures(2, HEIGHT, WIDTH)
    losses = cascade(images, labels=labels).loss_dict
    cascade.zero_grad()
    losses["loss_box_reg_3"].backward()
    reached = [any(p.grad is not None for p in stage.parameters()) for stage in cascade.head.stages]
    assert reached == [False, False, True]
    assert any(p.grad is not None for p in cascade.backbone.parameters())
