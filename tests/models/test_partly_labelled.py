"""Batches in which only some images have labels: the others are cut out of the loss, as if they were not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection, set_seed

from cankd_hf.errors import InputError
from cankd_hf.models.partly_labelled import run_labelled
from tests.training.native_detector_configs import FAMILIES

from .detectors import detector, pictures

OURS = ["fcos_resnet", "retinanet_resnet", "reppoints_resnet", "faster_rcnn_resnet", "cascade_rcnn_resnet"]
PROMPTED = ("grounding-dino", "mm-grounding-dino")
CHECKED = ("rt_detr", "detr")
NATIVE = [
    pytest.param(name, marks=[] if name in CHECKED else [pytest.mark.slow])
    for name in FAMILIES
    if name not in PROMPTED
]


def native(name: str) -> nn.Module:
    """A tiny detector of transformers without random parts, with losses at every decoder layer."""
    config = {**FAMILIES[name][0], "num_denoising": 0, "dropout": 0.0, "attention_dropout": 0.0, "num_labels": 3}
    if name not in ("yolos",):
        config["auxiliary_loss"] = True
    for key in ("drop_path_rate", "hidden_dropout_prob"):
        config.setdefault(key, 0.0)
    return AutoModelForObjectDetection.from_config(AutoConfig.for_model(name, **config)).train()


def still(model: nn.Module) -> nn.Module:
    """Norms with fixed statistics: those of a batch are of all its images."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    return model


def loss_and_gradients(model: nn.Module, images: Tensor, labels: Any, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    set_seed(0)
    loss = run_labelled(model, {"pixel_values": images, "labels": labels, **more}).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_cut(model: nn.Module, rows: list[int], **more: Any) -> None:
    """Loss and gradient are those of the labelled images alone, whatever the others show."""
    images, labels = pictures(4)
    some = [label if row in rows else None for row, label in enumerate(labels)]
    loss, gradients = loss_and_gradients(model, images, some, **more)
    alone, wanted = loss_and_gradients(model, images[rows], [labels[row] for row in rows])
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-5)
    assert wanted.keys() <= gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, wanted.get(name, torch.zeros_like(value)), rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", OURS)
def test_our_detectors(kind: str) -> None:
    set_seed(0)
    model = still(detector(kind, num_labels=3))
    assert_cut(model, [0, 1])
    assert_cut(model, [0, 1, 3])
    if kind == "fcos_resnet":
        assert_cut(model, [1, 2], output_dense=True)


@pytest.mark.parametrize("kind", OURS)
def test_detections_of_all_and_the_loss_of_some(kind: str) -> None:
    set_seed(0)
    model = detector(kind).eval()
    images, labels = pictures(3)
    with torch.no_grad():
        output = model(images, labels=[labels[0], None, labels[2]])
        whole, alone = model(images), model(images[[0, 2]], labels=[labels[0], labels[2]])
    torch.testing.assert_close(output.loss, alone.loss)
    torch.testing.assert_close(output.pred_boxes, whole.pred_boxes)


@pytest.mark.parametrize("name", NATIVE)
def test_detectors_of_transformers(name: str) -> None:
    set_seed(0)
    assert_cut(still(native(name)), [0, 1])
    assert_cut(still(native(name)), [0, 1, 3])


def test_denoising_reads_labelled_images_only() -> None:
    set_seed(0)
    config = AutoConfig.for_model("rt_detr", **{**FAMILIES["rt_detr"][0], "num_denoising": 8, "num_labels": 3})
    model = still(AutoModelForObjectDetection.from_config(config).train())
    images, labels = pictures(4)
    some = [labels[0], None, labels[2], None]
    loss, gradients = loss_and_gradients(model, images, some)
    others = images.clone()
    others[[1, 3]] = torch.randn_like(others[[1, 3]])
    again, moved = loss_and_gradients(model, others, some)
    torch.testing.assert_close(loss, again)
    assert any("denoising" in name for name in gradients)
    for key, value in gradients.items():
        torch.testing.assert_close(value, moved[key], rtol=2e-3, atol=2e-5)


def test_without_any_labels_the_loss_is_nothing() -> None:
    for model in (detector("fcos_resnet"), native("deformable_detr")):
        loss, gradients = loss_and_gradients(still(model), pictures(2)[0], [None, None])
        assert loss == 0 and gradients and not any(value.any() for value in gradients.values())


def test_a_model_with_another_kind_of_loss_is_refused() -> None:
    class Other(nn.Module):
        def forward(self, pixel_values: Tensor, labels: Any) -> Any:
            return {"loss": pixel_values.sum()}

    images, labels = pictures(2)
    with pytest.raises(InputError, match="does not call its `loss_function`"):
        run_labelled(Other(), {"pixel_values": images, "labels": [labels[0], None]})


def pseudo_labels(label: dict[str, Tensor], uncertain: Tensor | None = None) -> dict[str, Tensor]:
    return {**label, "uncertain": torch.zeros(0, 4) if uncertain is None else uncertain}


def run_pseudo(model: nn.Module, images: Tensor, labels: Any, pseudo: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss of the labelled images, loss of the others, and the gradient of the second."""
    model.zero_grad()
    set_seed(0)
    output = run_labelled(model, {"pixel_values": images, "labels": labels}, pseudo)
    output["pseudo_loss"].backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), output["pseudo_loss"].detach(), gradients


def students() -> list[Any]:
    return [
        *[pytest.param(lambda kind=kind: detector(kind), id=kind) for kind in OURS[:3]],
        *[pytest.param(lambda name=name: native(name), id=name) for name in CHECKED],
        *[
            pytest.param(lambda name=name: native(name), id=name, marks=pytest.mark.slow)
            for name in FAMILIES
            if name not in (*CHECKED, *PROMPTED)
        ],
    ]


@pytest.mark.parametrize("make", students())
def test_pseudo_labels_give_the_loss_of_labels(make: Any) -> None:
    set_seed(0)
    model = still(make())
    images, labels = pictures(4)
    some = [labels[0], None, labels[2], None]
    pseudo = [None, pseudo_labels(labels[1]), None, pseudo_labels(labels[3])]
    task, second, gradients = run_pseudo(model, images, some, pseudo)
    alone, _ = loss_and_gradients(model, images[[0, 2]], [labels[0], labels[2]])
    # two, not one: a tiny RT-DETR computes other gradients, of a million, in a batch of one
    wanted, slopes = loss_and_gradients(model, images[[1, 3]], [labels[1], labels[3]])
    torch.testing.assert_close(task, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-5)
    for name, value in gradients.items():
        torch.testing.assert_close(value, slopes.get(name, 0 * value), rtol=2e-3, atol=2e-5, msg=name)
    # without a label of either kind both are 0, with a gradient of 0
    task, second, gradients = run_pseudo(model, images, [None] * 4, [None] * 4)
    assert task == second == 0 and gradients and not any(value.any() for value in gradients.values())
    task, second, _ = run_pseudo(model, images, [None] * 4, pseudo)
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-5)
    assert task == 0


@pytest.mark.parametrize("make", students())
def test_uncertain_boxes_have_no_part_in_the_loss(make: Any) -> None:
    """With the whole picture uncertain, or all that queries predict, nothing is background."""
    set_seed(0)
    model = still(make())
    images, labels = pictures(2)
    nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    found = run_labelled(model, {"pixel_values": images, "labels": labels})
    boxes = getattr(found, "pred_boxes", None)
    whole = torch.tensor([[0.0, 0, 1, 1]])
    if boxes is not None:
        centre, half = boxes[1, :, :2].detach(), boxes[1, :, 2:].detach() / 2
        whole = torch.cat([centre - half, centre + half], 1)
    given = [labels[0], None]
    _, background, _ = run_pseudo(model, images, given, [None, pseudo_labels(nothing)])
    _, without, gradients = run_pseudo(model, images, given, [None, pseudo_labels(nothing, whole)])
    assert without < background
    last = [name for name in gradients if ("cls_logits" in name or "class_labels_classifier" in name)]
    assert not any(gradients[name].any() for name in last)


def test_faster_rcnn_cannot_leave_uncertain_boxes_out() -> None:
    images, labels = pictures(2)
    with pytest.raises(InputError, match="got the head faster_rcnn"):
        run_labelled(
            detector("faster_rcnn_resnet"),
            {"pixel_values": images, "labels": [labels[0], None]},
            [None, pseudo_labels(labels[1])],
        )
