"""The pyramid detectors against torchvision's own with equal weights: same losses, same detections."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert

from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection

from .detectors import Labels, detector, pictures
from .kinds import NAMES

CLASSES, CHANNELS, WIDTH = len(NAMES), 128, 24  # from 128 channels on our FCOS has 32 groups, as torchvision's
every_head = pytest.mark.parametrize("head", ["retinanet", "fcos", "faster_rcnn"])  # torchvision has no RepPoints


class Plain(GeneralizedRCNNTransform):
    """No resize and no normalisation: pixels are what the model gets."""

    def __init__(self) -> None:
        super().__init__(1, 1, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])

    def resize(self, image: Tensor, target: Any = None) -> Any:
        return image, target


class Pyramid(nn.Module):
    """Our backbone and neck, as torchvision wants them."""

    def __init__(self, model: FPNForObjectDetection) -> None:
        super().__init__()
        self.model, self.out_channels = [model], CHANNELS

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(i), x) for i, x in enumerate(self.model[0].pyramid(images)))


def torchvision_detector(head: str, model: FPNForObjectDetection) -> nn.Module:
    """torchvision's detector with our weights; its sizes of anchors and thresholds are its own defaults."""
    pyramid = Pyramid(model)
    if head == "retinanet":
        theirs = RetinaNet(pyramid, CLASSES, detections_per_img=100)
        assert isinstance(theirs.head, RetinaNetHead)
    elif head == "fcos":
        theirs = FCOS(pyramid, CLASSES)
    else:
        anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
        theirs = FasterRCNN(pyramid, None, rpn_anchor_generator=anchors, box_predictor=nn.Identity())
        theirs.roi_heads.box_head = TwoMLPHead(CHANNELS * 49, WIDTH)
        theirs.roi_heads.box_predictor = type(model.head.roi_heads.box_predictor)(WIDTH, CLASSES + 1)
    theirs.load_state_dict(model.head.state_dict())
    theirs.transform = Plain()
    return theirs


def both(head: str) -> tuple[FPNForObjectDetection, nn.Module]:
    model = detector(f"{head}_resnet", fpn_channels=CHANNELS, head_channels=WIDTH, head_layers=None)
    with torch.no_grad():  # an untrained head says the same of everything
        for name, parameter in model.head.named_parameters():
            if name.endswith("cls_logits.bias"):
                parameter.fill_(-1.0)
            elif parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval(), torchvision_detector(head, model)


def their_targets(head: str, labels: Labels, height: int, width: int) -> list[dict[str, Tensor]]:
    """Corners in pixels; Faster R-CNN counts classes from 1."""
    scale = torch.tensor([width, height, width, height])
    shift = int(head == "faster_rcnn")
    return [
        {"boxes": box_convert(y["boxes"], "cxcywh", "xyxy") * scale, "labels": y["class_labels"] + shift}
        for y in labels
    ]


@every_head
def test_same_losses_as_torchvision(head: str) -> None:
    """With one seed, because Faster R-CNN samples proposals."""
    model, theirs = both(head)
    images, labels = pictures(2, 128, 192)
    model.train(), theirs.train()
    torch.manual_seed(3)
    got = model(images, labels=labels)
    torch.manual_seed(3)
    expected = theirs(list(images), their_targets(head, labels, 128, 192))
    assert set(got.loss_dict) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got.loss_dict[name], value)
        assert value > 0
    torch.testing.assert_close(got.loss, sum(expected.values()))


@every_head
def test_same_losses_in_eval_mode(head: str) -> None:
    """What torchvision would say if it spoke in eval mode; of Faster R-CNN, by its own seed and proposals."""
    model, theirs = both(head)
    images, labels = pictures(2, 128, 192)
    got = model(images, labels=labels).loss_dict
    theirs.train()
    if head == "faster_rcnn":
        theirs.rpn._pre_nms_top_n["training"] = 1000
        theirs.rpn._post_nms_top_n["training"] = 1000
    torch.manual_seed(0)
    expected = theirs(list(images), their_targets(head, labels, 128, 192))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@every_head
def test_same_detections_as_torchvision(head: str) -> None:
    """Images of two sizes: torchvision pads them, we get them padded, with a mask."""
    model, theirs = both(head)
    images, _ = pictures(2, 128, 192)
    mask = torch.ones(2, 128, 192)
    mask[1, 96:], mask[1, :, 150:] = 0, 0
    images = images * mask[:, None]
    theirs.eval()
    with torch.no_grad():
        expected = theirs([images[0], images[1, :, :96, :150]])
        output = model(images, pixel_mask=mask)
    got = model.post_process_object_detection(output, 0.0, [(128, 192), (96, 150)], pixel_mask=mask)
    for one, wanted in zip(got, expected, strict=True):
        assert len(wanted["scores"]) > 10
        torch.testing.assert_close(one["scores"], wanted["scores"])
        torch.testing.assert_close(one["boxes"], wanted["boxes"], rtol=1e-4, atol=1e-3)
        assert torch.equal(one["labels"] + int(head == "faster_rcnn"), wanted["labels"])


@every_head
def test_defaults_are_those_of_torchvision(head: str) -> None:
    model = detector(f"{head}_resnet", fpn_channels=CHANNELS, head_channels=None, head_layers=None)
    pyramid = Pyramid(model)
    theirs: Any = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN}[head](pyramid, 91)
    ours = model.head
    if head == "faster_rcnn":
        assert ours.roi_heads.box_head.fc7.weight.shape == theirs.roi_heads.box_head.fc7.weight.shape
        assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
        pairs = [(ours.roi_heads, theirs.roi_heads)]
    else:
        assert ours.anchor_generator.sizes == theirs.anchor_generator.sizes
        assert ours.topk_candidates == theirs.topk_candidates
        pairs = [(ours, theirs)]
    for our, their in pairs:
        assert (our.score_thresh, our.nms_thresh) == (their.score_thresh, their.nms_thresh)
    shapes = [{name: x.shape for name, x in module.state_dict().items()} for module in (ours, theirs)]
    assert set(shapes[0]) == set(shapes[1])
    assert all(shapes[1][name][1:] == shape[1:] for name, shape in shapes[0].items())
