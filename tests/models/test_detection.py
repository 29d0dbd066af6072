"""The pyramid detectors: what holds for each head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    DeformableDetrImageProcessor,
    DetrImageProcessor,
    RTDetrImageProcessor,
    pipeline,
)

from cankd_hf.features.taps import Taps
from cankd_hf.hub.files import student_files
from cankd_hf.models import register
from cankd_hf.models.fpn.configuration_cankd_fpn import DETECTION_HEADS, TWO_STAGE_HEADS, FPNConfig
from cankd_hf.models.fpn.modeling_cankd_fpn import FPNForSemanticSegmentation
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection, FPNObjectDetectionOutput

from .detectors import DETECTORS, Labels, detector, pictures
from .kinds import CONVNEXT, NAMES, RESNET

register()
every_detector = pytest.mark.parametrize("kind", DETECTORS)
every_head = pytest.mark.parametrize("head", DETECTION_HEADS)


@every_detector
def test_losses_in_train_and_eval_and_detections_in_eval(kind: str) -> None:
    model = detector(kind)
    images, labels = pictures()
    output = model(pixel_values=images, labels=labels)
    output.loss.backward()
    assert model.training and output.logits is None and output.pred_boxes is None
    assert output.loss.shape == () and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert all("mask_token" in name for name in without), without

    model.eval()
    with torch.no_grad():
        scored = model(pixel_values=images, labels=labels)
        assert model(images).loss is None
    assert set(scored.loss_dict) == set(output.loss_dict) and torch.isfinite(scored.loss)
    assert scored.logits.shape == (2, model.config.max_detections, len(NAMES))
    assert scored.pred_boxes.shape == (2, model.config.max_detections, 4)
    assert scored.hidden_states is None


@every_head
def test_the_output_in_its_other_forms(head: str) -> None:
    """A tuple, and what accelerate makes of it under mixed precision: the same class, from a mapping."""
    model = detector(f"{head}_resnet").eval()
    images, labels = pictures()
    with torch.no_grad():
        output = model(images, labels=labels, output_hidden_states=True)
        loss, losses, logits, boxes, maps = model(images, labels=labels, output_hidden_states=True, return_dict=False)
    again = type(output)(dict(output.items()))
    assert list(again) == ["loss", "loss_dict", "logits", "pred_boxes", "hidden_states"]
    torch.testing.assert_close((loss, losses, logits, boxes, maps), again.to_tuple())
    assert torch.equal(again.logits, logits) and len(again.hidden_states) == 5


@every_head
def test_evaluation_is_the_same_each_time_and_leaves_the_random_numbers_alone(head: str) -> None:
    """Faster R-CNN draws a sample of proposals for its losses."""
    model = detector(f"{head}_resnet").eval()
    images, labels = pictures()
    before = torch.get_rng_state()
    first = model(images, labels=labels).loss
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(model(images, labels=labels).loss, first)


@every_head
def test_images_without_objects_and_labels_on_the_edge(head: str) -> None:
    model = detector(f"{head}_resnet")
    images, labels = pictures()
    for given in (labels[:1] + empty(1), empty(2)):
        loss = model(images, labels=given).loss
        loss.backward()
        assert torch.isfinite(loss)
    whole = {"class_labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0]])}
    assert torch.isfinite(model(images, labels=[whole, whole]).loss)


def empty(count: int) -> Labels:
    return [{"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)} for _ in range(count)]


@every_head
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], "one dictionary for each of 2 images, got 0"),
        ([{"class_labels": torch.tensor([3]), "boxes": torch.full((1, 4), 0.5)}] * 2, r"labels\[0\].*classes 0 to 2"),
        ([{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.0, 0.1]])}] * 2, "with an area"),
    ],
)
def test_bad_labels_are_named(head: str, labels: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        detector(f"{head}_resnet")(pictures()[0], labels=labels)


@every_head
def test_bf16_autocast_gives_float32(head: str) -> None:
    model = detector(f"{head}_resnet")
    images, labels = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, labels=labels).loss
        loss.backward()
        output = model.eval()(images)
    assert loss.dtype == output.logits.dtype == output.pred_boxes.dtype == torch.float32
    assert torch.isfinite(loss)
    assert model.to(torch.bfloat16)(images.bfloat16()).pred_boxes.dtype == torch.float32


@every_detector
def test_levels_are_what_the_neck_gives_and_a_tap_finds(kind: str) -> None:
    model = detector(kind).eval()
    taps = Taps(model)
    assert taps.paths == ["neck"]
    maps = taps.run(torch.randn(1, 3, 224, 448))
    assert [x.shape[1] for x in maps] == [channels for channels, _ in model.levels]
    for x, (_, stride) in zip(maps, model.levels, strict=True):
        assert x.shape[-2:] == (math.ceil(224 / stride), math.ceil(448 / stride))
    assert len(maps) == 5
    strides = [4, 8, 16, 32, 64] if "_rcnn" in kind else [8, 16, 32, 64, 128]
    assert [stride for _, stride in model.levels] == strides
    taps.remove()


@every_head
def test_any_size_and_what_padding_is(head: str) -> None:
    """The mask says where the image ends: no box crosses it, and boxes count in the padded size."""
    model = busy(detector(f"{head}_resnet")).eval()
    images, mask = torch.zeros(2, 3, 75, 95), torch.zeros(2, 75, 95)
    mask[0] = 1
    mask[1, :40, :60] = 1
    with torch.no_grad():
        output = model(images, pixel_mask=mask)
    found = model.post_process_object_detection(output)
    for one, (width, height) in zip(found, ((1, 1), (60 / 95, 40 / 75)), strict=True):
        assert len(one["scores"]) == model.config.max_detections
        assert one["boxes"].min() >= 0
        assert (one["boxes"].amax(0)[2:] <= torch.tensor([width, height]) + 1e-6).all()
    inside = model.post_process_object_detection(output, target_sizes=[(150, 190), (80, 120)], pixel_mask=mask)
    for one, scaled in zip(found, inside, strict=True):  # both originals were twice as large
        torch.testing.assert_close(one["boxes"] * torch.tensor([190.0, 150.0, 190.0, 150.0]), scaled["boxes"])
    assert torch.isfinite(model(images[..., :33, :47]).logits).all()


@every_head
def test_detections_do_not_hang_on_the_rest_of_the_batch(head: str) -> None:
    model = busy(detector(f"{head}_resnet", max_detections=20)).eval()
    with torch.no_grad():
        for parameter in model.head.parameters():  # else all scores are nearly equal
            parameter.mul_(3 if parameter.ndim > 1 else 1)
        images = torch.cat([pictures(2)[0], torch.full((1, 3, 64, 96), 5.0)])
        together = model(images)
        for i, image in enumerate(images):
            alone = model(image[None])
            torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(alone.pred_boxes[0], together.pred_boxes[i], rtol=1e-4, atol=1e-4)
            assert (alone.logits[0] > -100).any()


@pytest.mark.parametrize("kind", ["retinanet_resnet", "fcos_dinov2"])
def test_labels_and_predictions_speak_of_the_same_boxes(kind: str) -> None:
    """Also where images are stretched to fit a plain ViT."""
    model = detector(kind).eval()
    _, labels = pictures()
    extent, covered = model.map_frame((75, 110))
    assert (extent, covered) == (((75, 110), (96, 128)) if kind == "retinanet_resnet" else ((64, 96), (64, 96)))
    targets = [{**one, "scores": torch.tensor([0.9, 0.8])} for one in model.targets(labels, 2, extent)]
    logits, boxes = model.encode(targets, extent)
    found = model.post_process_object_detection(FPNObjectDetectionOutput(logits=logits, pred_boxes=boxes))
    for one, label, row in zip(found, labels, boxes, strict=True):
        torch.testing.assert_close(one["scores"], torch.tensor([0.9, 0.8]))
        torch.testing.assert_close(one["labels"], label["class_labels"])
        torch.testing.assert_close(row[:2], label["boxes"])
    maps = model.pyramid(torch.zeros(1, 3, 75, 110))
    assert maps[0].shape[-2:] == (covered[0] // 8, covered[1] // 8)
    mask = torch.zeros(1, 75, 110)
    mask[0, :50, :55] = 1
    with torch.no_grad():
        boxes = model.post_process_object_detection(busy(model)(torch.zeros(1, 3, 75, 110), pixel_mask=mask))[0][
            "boxes"
        ]
    assert len(boxes) and (boxes.amax(0)[2:] <= torch.tensor([0.5, 50 / 75]) + 1e-6).all()


def busy(model: FPNForObjectDetection) -> FPNForObjectDetection:
    """The same with so low a threshold that an untrained model detects something everywhere."""
    for module in model.modules():
        if "score_thresh" in module.__dict__ and "rpn" not in type(module).__name__.lower():
            module.score_thresh = 1e-6
    return model


@every_head
def test_image_processors_read_the_output_as_the_model_does(head: str) -> None:
    model = busy(detector(f"{head}_resnet", max_detections=20)).eval()
    images, _ = pictures()
    sizes = [(300, 200), (100, 400)]
    with torch.no_grad():
        output = model(images)
    expected = model.post_process_object_detection(output, 0.001, sizes)
    assert sum(len(one["scores"]) for one in expected) > 0
    for processor in (DeformableDetrImageProcessor(), RTDetrImageProcessor()):
        found = processor.post_process_object_detection(output, threshold=0.001, target_sizes=torch.tensor(sizes))
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one["scores"], wanted["scores"])
            for i in range(len(wanted["scores"])):  # equal scores may come in another order
                same = (one["boxes"] - wanted["boxes"][i]).abs().amax(1) < 0.01
                assert (one["labels"][same] == wanted["labels"][i]).any()


@every_detector
def test_saves_and_loads_the_same_and_carries_its_code(kind: str, tmp_path: Path) -> None:
    model = detector(kind)
    images, labels = pictures()
    model(images)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(again) is FPNForObjectDetection and again.config.to_dict()["head"] == model.config.head
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        expected, got = model(images, labels=labels), again(images, labels=labels)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes)
    assert {key.split(".")[0] for key in model.state_dict()} <= {"backbone", "neck", "head"}
    assert sorted(path.name for path in tmp_path.glob("*.py")) == [
        "cascade_cankd_fpn.py",
        "configuration_cankd_fpn.py",
        "conventions_cankd_fpn.py",
        "deformable_cankd_fpn.py",
        "detection_heads_cankd_fpn.py",
        "fcos_cankd_fpn.py",
        "levels_cankd_fpn.py",
        "modeling_cankd_fpn.py",
        "modeling_cankd_fpn_detection.py",
        "prototypes_cankd_fpn.py",
        "reppoints_cankd_fpn.py",
    ]
    assert {path.name for path in student_files(tmp_path)} >= {path.name for path in tmp_path.glob("*.py")}
    with pytest.raises(ValueError, match="is a head for FPNForObjectDetection"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path)


@every_head
def test_a_head_starts_as_published(head: str, tmp_path: Path) -> None:
    """`post_init` of transformers would draw every layer anew and set every bias to 0."""
    model = detector(f"{head}_resnet")
    model.save_pretrained(tmp_path)
    other = AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    for made, classes in ((model, len(NAMES)), (other, 7)):
        if head in TWO_STAGE_HEADS:
            roi = made.head.stages[-1] if head == "cascade_rcnn" else made.head.roi_heads
            predictor = roi.box_predictor.cls_score
            assert len(predictor.bias) == classes + 1 and predictor.bias.abs().max() > 0
            assert predictor.weight.abs().max() <= predictor.in_features**-0.5
            assert 0.008 < made.head.rpn.head.cls_logits.weight.std() < 0.012
            continue
        part = made.head.head if head == "reppoints" else made.head.head.classification_head
        classifier = part.cls_logits
        assert len(classifier.bias) == classes * (9 if head == "retinanet" else 1)
        torch.testing.assert_close(classifier.bias, torch.full_like(classifier.bias, math.log(0.01 / 0.99)))
        assert 0.008 < classifier.weight.std() < 0.012
    kept = {key: value for key, value in model.state_dict().items() if value.shape == other.state_dict()[key].shape}
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in kept.items())


@every_head
@pytest.mark.parametrize("processor", [DeformableDetrImageProcessor, RTDetrImageProcessor])
def test_pipeline(head: str, processor: type, tmp_path: Path) -> None:
    busy_config = {"score_threshold": 0.0, "max_detections": 5}
    detector(f"{head}_resnet", **busy_config).save_pretrained(tmp_path)
    size = {"shortest_edge": 48, "longest_edge": 64}
    processor(size=size if processor is DeformableDetrImageProcessor else {"height": 64, "width": 64}).save_pretrained(
        tmp_path
    )
    found = pipeline("object-detection", str(tmp_path))(Image.new("RGB", (50, 40), "red"), threshold=0.0)
    assert 0 < len(found) <= 5
    for one in found:
        assert one["label"] in NAMES.values() and one["score"] > 0
        assert 0 <= one["box"]["xmin"] <= one["box"]["xmax"] <= 50 and 0 <= one["box"]["ymax"] <= 40


def test_labels_are_what_the_processors_of_transformers_make() -> None:
    """Their boxes count in the padded size, and so do ours."""
    annotation = {"category_id": 1, "bbox": [10, 20, 30, 10], "area": 300, "iscrowd": 0}
    targets = [{"image_id": i, "annotations": [{**annotation, "image_id": i}]} for i in range(2)]
    pair = [Image.new("RGB", (80, 40)), Image.new("RGB", (40, 80))]
    for processor in (DeformableDetrImageProcessor, DetrImageProcessor):
        batch = processor(size={"shortest_edge": 40, "longest_edge": 80})(pair, targets, return_tensors="pt")
        assert batch["pixel_values"].shape == (2, 3, 80, 80)
        model = detector("retinanet_resnet").eval()
        made = model.targets(batch["labels"], 2, (80, 80))
        for one in made:
            torch.testing.assert_close(one["boxes"], torch.tensor([[10.0, 20.0, 40.0, 30.0]]))
            assert one["labels"].tolist() == [1]
        assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head": "yolo"}, "FPNConfig.head: expected one of"),
        ({"head": "fcos", "norm": "batch"}, "FPNConfig.norm: expected one of group"),
        ({"head": "reppoints", "norm": "none"}, "FPNConfig.norm: expected one of group"),
        ({"head": "retinanet", "neck": "none"}, "needs a neck"),
        ({"head": "retinanet", "head_layers": 5}, "at most 4"),
        ({"head": "faster_rcnn", "head_layers": 0}, "at least 1"),
        ({"head": "fcos", "anchor_scale": 0}, "anchor_scale: expected above 0"),
        ({"head": "fcos", "nms_threshold": 2}, "nms_threshold: expected 0 to 1"),
        ({"head": "fcos", "max_detections": 0}, "max_detections: expected a whole number"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FPNConfig(**settings)


def test_heads_and_classes_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="is a head for FPNForObjectDetection"):
        FPNForSemanticSegmentation(FPNConfig(backbone_config=RESNET, head="fcos"))
    with pytest.raises(ValueError, match="is a head for FPNForSemanticSegmentation"):
        FPNForObjectDetection(FPNConfig(backbone_config=RESNET))
    assert "anchor_scale" not in FPNConfig(backbone_config=CONVNEXT).to_dict()


@pytest.mark.parametrize("channels", [4, 6, 48, 64, 256])
def test_fcos_has_as_many_groups_as_fit(channels: int) -> None:
    model = detector("fcos_resnet", fpn_channels=channels)
    groups = {m.num_groups for m in model.head.modules() if isinstance(m, nn.GroupNorm)}
    assert len(groups) == 1 and channels % groups.pop() == 0
    if channels == 256:
        assert {m.num_groups for m in model.head.modules() if isinstance(m, nn.GroupNorm)} == {32}
    assert torch.isfinite(model(torch.randn(1, 3, 64, 64), labels=empty(1)).loss)
