"""Mask R-CNN and Cascade Mask R-CNN against a naive re-derivation, and what is asked of every student."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import get_model

from cankd_hf.models.fpn.cascade_cankd_fpn import STAGES
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.masks_cankd_fpn import MaskBranch, cropped
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection
from cankd_hf.models.fpn.modeling_cankd_fpn_instances import FPNForInstanceSegmentation
from cankd_hf.models.inherit import inherit
from cankd_hf.models.partly_labelled import run_labelled
from cankd_hf.models.plain_detectors import best_in_order
from cankd_hf.models.torchvision_teachers import TorchvisionNet
from cankd_hf.tasks import InstanceSegmentationTask, task_for
from cankd_hf.tasks.instance_outputs import in_boxes, in_picture
from tests.models.detectors import detector
from tests.models.kinds import NAMES

from .kinds import KINDS, pictures, student

HEIGHT, WIDTH = 128, 192
STRIDES = (4, 8, 16, 32)


def bilinear(x: Tensor, row: float, column: float) -> Tensor:
    """A map [C, H, W] between its cells, as RoI align reads it: 0 from one cell beyond its border on."""
    height, width = x.shape[-2:]
    if not (-1 <= row <= height and -1 <= column <= width):
        return x.new_zeros(len(x))
    row, column = min(max(row, 0.0), height - 1.0), min(max(column, 0.0), width - 1.0)
    top, left = int(row), int(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = row - top, column - left
    upper = x[:, top, left] * (1 - across) + x[:, top, right] * across
    lower = x[:, bottom, left] * (1 - across) + x[:, bottom, right] * across
    return upper * (1 - down) + lower * down


def pooled(x: Tensor, box: list[float], side: int, samples: int | None) -> Tensor:
    """A box in cells of a map [C, H, W] -> [C, side, side]: the mean of samples x samples values of each bin; None:
    as many as the bin has cells."""
    x0, y0, x1, y1 = box
    height, width = max(y1 - y0, 1.0), max(x1 - x0, 1.0)
    counts = [samples or math.ceil(size / side) for size in (height, width)]
    bins = x.new_zeros(len(x), side, side)
    for i in range(side):
        for j in range(side):
            total = x.new_zeros(len(x))
            for a in range(counts[0]):
                for b in range(counts[1]):
                    row = y0 + (i + (a + 0.5) / counts[0]) * height / side
                    total += bilinear(x, row, x0 + (j + (b + 0.5) / counts[1]) * width / side)
            bins[:, i, j] = total / (counts[0] * counts[1])
    return bins


def features(maps: list[Tensor], image: int, box: Tensor) -> Tensor:
    """Those of a box in pixels, from the level of its size: 224 pixels are read at stride 16."""
    x0, y0, x1, y1 = box.tolist()
    level = math.floor(4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224 + 1e-6))
    place = min(max(level, 2), 5) - 2
    return pooled(maps[place][image].double(), [side / STRIDES[place] for side in (x0, y0, x1, y1)], 14, 2)


def masks_of(branch: MaskBranch, x: Tensor) -> Tensor:
    """Logits [K, 28, 28]: four convolutions, a transposed one, and a linear layer of each cell."""
    state = {name: value.double() for name, value in branch.state_dict().items()}
    x = x[None]
    for layer in range(4):
        x = F.conv2d(x, state[f"head.{layer}.0.weight"], state[f"head.{layer}.0.bias"], padding=1).clamp(min=0)
    x = F.conv_transpose2d(x, state["predictor.conv5_mask.weight"], state["predictor.conv5_mask.bias"], stride=2)
    weight, bias = state["predictor.mask_fcn_logits.weight"][:, :, 0, 0], state["predictor.mask_fcn_logits.bias"]
    return torch.einsum("kc,cij->kij", weight, x[0].clamp(min=0)) + bias[:, None, None]


def overlap(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    return (
        both
        / sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
        / (1 - both / sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)))
    )


@pytest.fixture(scope="module", params=["faster_rcnn", "cascade_rcnn"])
def masked(request: pytest.FixtureRequest) -> Any:
    model = student(request.param, score_threshold=0.0, max_detections=3).eval()
    with torch.no_grad():  # an untrained head says the same of everything
        for name, parameter in model.head.named_parameters():
            parameter.mul_(3 if parameter.ndim > 1 and "rpn" in name else 1.5)
    for mode in ("training", "testing"):
        model.head.rpn._post_nms_top_n[mode] = 5
    return model


@torch.no_grad()
def test_the_loss_of_masks(masked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the samples that show objects, the mean over 28 x 28 cells of the cross-entropy of the own class alone."""
    torch.manual_seed(3)
    images, labels = pictures(HEIGHT, WIDTH)
    cascaded = masked.config.head == "cascade_rcnn"
    stages = masked.head.in_order() if cascaded else [masked.head.roi_heads]
    branches = list(masked.head.mask_branches) if cascaded else [masked.head.mask_branch]
    taken: list[Any] = []
    for stage in stages:
        chosen = stage.select_training_samples
        monkeypatch.setattr(
            stage, "select_training_samples", lambda *a, own=chosen: taken.append(own(*a)) or taken[-1]
        )
    got = masked(images, labels=labels).loss_dict
    maps, targets = masked.pyramid(images), masked.targets(labels, 2, (HEIGHT, WIDTH))
    for number, (branch, (boxes, _, classes, _)) in enumerate(zip(branches, taken, strict=True)):
        least, weight = (STAGES[number][0], STAGES[number][2]) if cascaded else (0.5, 1.0)
        values = []
        for image, target in enumerate(targets):
            for box, kind in zip(boxes[image], classes[image].tolist(), strict=True):
                found = [overlap(box.tolist(), truth.tolist()) for truth in target["boxes"]]
                best = max(range(len(found)), key=found.__getitem__)
                assert (kind > 0) == (found[best] >= least)
                if kind > 0:
                    assert kind - 1 == int(target["labels"][best])
                    wanted = pooled(target["masks"][best][None].double(), box.tolist(), 28, None)[0]
                    logits = masks_of(branch, features(maps, image, box))[kind - 1]
                    values.append((logits.clamp(min=0) - logits * wanted + (-logits.abs()).exp().log1p()).mean())
        assert len(values) > 3
        name = f"loss_mask_{number + 1}" if cascaded else "loss_mask"
        assert float(got[name]) == pytest.approx(weight * float(torch.stack(values).mean()), rel=1e-3)
    assert sum("mask" in name for name in got) == len(branches)


@torch.no_grad()
def test_the_masks_of_detections(masked: Any) -> None:
    """Those of the detected class in the final boxes; of a cascade the mean of the three branches' probabilities."""
    torch.manual_seed(4)
    images, _ = pictures(HEIGHT, WIDTH)
    output, maps = masked(images), masked.pyramid(images)
    found = masked.post_process_object_detection(output, 0.0, [(HEIGHT, WIDTH)] * 2)
    branches = [part for part in masked.head.modules() if isinstance(part, MaskBranch)]
    assert output.pred_masks.shape == (2, 3, 28, 28)
    compared = 0
    for image, one in enumerate(found):
        for row, (box, kind) in enumerate(zip(one["boxes"], one["labels"].tolist(), strict=True)):
            rated = [masks_of(branch, features(maps, image, box))[kind].sigmoid() for branch in branches]
            expected = torch.stack(rated).mean(0)
            torch.testing.assert_close(
                output.pred_masks[image, row].sigmoid().double(), expected, atol=1e-3, rtol=1e-3
            )
            compared += 1
    assert compared >= 3 and not output.pred_masks[0, len(found[0]["scores"]) :].any()


def test_openmmlab_conventions_of_mask_targets() -> None:
    """Samples in the middle of pixels, and targets of 0 and 1 (mmdet.structures.mask.BitmapMasks.crop_and_resize)."""
    masks = torch.zeros(1, 20, 20)
    masks[0, 5:15, 3:10] = 1
    box = torch.tensor([[3.0, 5.0, 17.0, 15.0]])
    matched = torch.zeros(1, dtype=torch.int64)
    exact = cropped(masks, box, matched, 28, True)[0]
    assert set(exact.unique().tolist()) == {0.0, 1.0} and exact[:, :14].all() and not exact[:, 15:].any()
    assert 0 < cropped(masks, box, matched, 28, False)[0].sum() < exact.numel()
    assert cropped(masks, box[:0], matched[:0], 28, True).shape == (0, 28, 28)


def test_masks_in_pixels() -> None:
    logits = torch.full((2, 28, 28), 9.0)
    logits[1, :, 14:] = -9
    found = in_boxes(logits, torch.tensor([[4.0, 2, 24, 22], [10, 10, 30, 20]]), (40, 50))
    assert found.shape == (2, 40, 50) and found.dtype == torch.bool
    assert found[0, 2:22, 4:24].float().mean() > 0.99 and found[0].sum() <= 22 * 22
    columns = found[1, 15].nonzero().flatten().tolist()
    assert min(columns) in (9, 10) and max(columns) in (19, 20), "the left half"
    whole = torch.full((1, 8, 10), -1.0)
    whole[:, :4] = 1
    assert in_picture(whole, torch.tensor([16.0, 20.0]), (14, 18))[0].sum() == 8 * 18, "of a picture with its padding"
    assert in_picture(whole[:0], torch.tensor([16.0, 20.0]), (14, 18)).shape == (0, 14, 18)
    assert in_boxes(logits[:0], torch.zeros(0, 4), (40, 50)).shape == (0, 40, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_students_train_on_any_size_and_detect(kind: str) -> None:
    model = student(kind, score_threshold=0.0, max_detections=5)
    images, labels = pictures(70, 93)
    none = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    output = model(images, labels=[labels[0], none])
    output.loss.backward()
    assert output.loss.isfinite() and output.logits is None
    assert all(p.grad is not None for p in model.head.parameters())
    nothing = run_labelled(model, {"pixel_values": images, "labels": [None, None]})
    assert nothing["loss"] == 0
    found = model.eval()(images, pixel_mask=torch.ones(2, 70, 93))
    (first, _) = model.post_process_instance_segmentation(found, 0.0, [(70, 93), (140, 186)])
    assert first["masks"].shape == (len(first["scores"]), 70, 93) and len(first["scores"]) == 5
    assert (first["boxes"][:, 2:] <= torch.tensor([93.0, 70.0]) + 1e-3).all()
    assert isinstance(task_for(model), InstanceSegmentationTask)


def test_what_is_refused() -> None:
    backbone = KINDS["faster_rcnn"]["backbone_config"]
    for head, masks, said in (
        (
            "reppoints",
            True,
            "masks: expected false for 'reppoints', got true; .* one of faster_rcnn, cascade_rcnn, fcos",
        ),
        ("faster_rcnn", 3, "False, True .* got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            FPNConfig(backbone_config=backbone, head=head, masks=masks)
    with pytest.raises(ValueError, match=r"expected masks: true, got .* FPNForObjectDetection; set masks to true and"):
        FPNForInstanceSegmentation(FPNConfig(backbone_config=backbone, head="faster_rcnn"))
    with pytest.raises(ValueError, match=r"expected masks: false, got a .* FPNForInstance\w+; set masks to false, or"):
        FPNForObjectDetection(student("faster_rcnn").config)
    images, labels = pictures(64, 64)
    model = student("faster_rcnn")
    with pytest.raises(ValueError, match=r"labels\[0\].masks: expected \[2, H, W\], got none"):
        model(images, labels=[{k: v for k, v in label.items() if k != "masks"} for label in labels])
    with pytest.raises(ValueError, match=r"masks: expected \[2, H, W\], got the shape \[1, 64, 64\]"):
        model(images, labels=[{**label, "masks": label["masks"][:1]} for label in labels])
    with pytest.raises(ValueError, match="target_sizes: expected"):
        model.post_process_instance_segmentation(model.eval()(images))


def test_detectors_without_masks_are_as_they_were() -> None:
    """Names of weights and configuration: a saved detector loads as before."""
    model = detector("faster_rcnn_resnet")
    assert (
        not any("mask" in name for name in model.state_dict())
        and model.config.masks is False
        and "masks" not in detector("retinanet_resnet").config.to_dict()
    )
    ours = student("faster_rcnn").state_dict()
    assert {name for name in ours if "mask" not in name} == set(model.state_dict())


@pytest.mark.slow
def test_a_student_starts_from_torchvisions_mask_rcnn() -> None:
    theirs = get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=len(NAMES) + 1)
    model = student("faster_rcnn", fpn_channels=256, head_channels=1024)
    (head,) = inherit(model, TorchvisionNet(theirs), ["head"])
    assert {name.split(" ")[0] for name in head.left} == {
        f"head.mask_branch.predictor.mask_fcn_logits.{part}" for part in ("weight", "bias")
    }, "torchvision's has a mask of the background, ours has none"
    x = torch.randn(2, 256, 14, 14)
    with torch.no_grad():
        assert torch.equal(model.head.mask_branch.head(x), theirs.roi_heads.mask_head(x))


def test_an_exported_form_breaks_ties_as_the_model_does() -> None:
    """Anchors have equal logits where no channel is active: which of them are proposed must not be left open."""
    model = student("faster_rcnn").eval()
    head = model.head.rpn.head
    torch.nn.init.zeros_(head.cls_logits.weight)
    model.head.rpn._pre_nms_top_n["testing"] = 40
    images, _ = pictures(64, 96)
    form = InstanceSegmentationTask.export_form(model, (64, 96))
    wanted = form.expected(model, images)
    with torch.no_grad():
        got = list(form.module(images))
    assert (wanted[0] > 0).any()
    result = form.compare(wanted, got, [2, 3, 64, 96], exact=True)
    assert result.passed, result
    values, places = best_in_order(torch.tensor([[0.5, 9.0, 0.5, 9.0, 0.5]]), 4)
    assert places.tolist() == [[1, 3, 0, 2]] and values.tolist() == [[9.0, 9.0, 0.5, 0.5]]
    values, places = best_in_order(torch.tensor([[-1.0, 0.5]]), 3)
    assert places.tolist() == [[1, 0, 0]] and values.tolist() == [[0.5, -1.0, -1.0]]
