"""Each head learns 8 generated images by heart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from cankd_hf.models.fpn.configuration_cankd_fpn import DETECTION_HEADS

from .detectors import Labels, detector, pictures
from .kinds import NAMES

STEPS = {"retinanet": 150, "fcos": 150, "faster_rcnn": 120}


def ap50(found: list[dict[str, Tensor]], labels: Labels) -> float:
    """Mean over classes of the area under precision over recall, boxes matched greedily from an overlap of 0.5 on."""
    areas = []
    for kind in NAMES:
        hits: list[tuple[float, bool]] = []
        total = 0
        for one, label in zip(found, labels, strict=True):
            truth = box_convert(label["boxes"][label["class_labels"] == kind], "cxcywh", "xyxy")
            total += len(truth)
            free = torch.ones(len(truth), dtype=torch.bool)
            mine = one["labels"] == kind
            for score, box in zip(one["scores"][mine], one["boxes"][mine], strict=True):
                overlaps = box_iou(box[None], truth)[0] * free
                hit = len(truth) > 0 and bool(overlaps.max() >= 0.5)
                if hit:
                    free[overlaps.argmax()] = False
                hits.append((score.item(), hit))
        if total == 0:
            continue
        right = torch.tensor([hit for _, hit in sorted(hits, reverse=True)], dtype=torch.float32)
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        areas.append((precision * right).sum().item() / total)
    return sum(areas) / len(areas)


def test_the_measure_itself() -> None:
    _, labels = pictures(3)
    right = [
        {
            "scores": torch.ones(2),
            "labels": y["class_labels"],
            "boxes": box_convert(y["boxes"], "cxcywh", "xyxy"),
        }
        for y in labels
    ]
    assert ap50(right, labels) == pytest.approx(1)
    assert ap50([{**one, "labels": (one["labels"] + 1) % 3} for one in right], labels) == 0
    assert ap50([{name: value[:1] for name, value in one.items()} for one in right], labels) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("head", DETECTION_HEADS)
def test_overfits_eight_images(head: str) -> None:
    model = detector(
        f"{head}_resnet",
        fpn_channels=32,
        head_channels=64,
        head_layers=2 if head != "faster_rcnn" else 1,
        anchor_scale={"retinanet": 3.0, "fcos": 1.0, "faster_rcnn": 4.0}[head],
    )
    images, labels = pictures(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS[head], pct_start=0.2)
    for step in range(STEPS[head]):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 30 == 0 or step == STEPS[head] - 1:
            print(f"{head}: step {step}, loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        score = ap50(model.post_process_object_detection(model(images)), labels)
    print(f"{head}: AP50 {score:.3f}")
    assert score >= 0.9
