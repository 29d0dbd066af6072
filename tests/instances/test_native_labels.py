"""The families of transformers that segment instances, through one form of labels and of answers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import set_seed
from transformers.loss import loss_for_object_detection

from cankd_hf.models.configs import config_from_dict
from cankd_hf.models.native_masks import BOXED, NATIVE, UNIVERSAL, auto_class, prepare
from cankd_hf.models.partly_labelled import run_labelled
from tests.instances.native_configs import SIZE, config

SLOW = {"eomt_dinov3"}  # almost the code of another
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NATIVE]
)


def native(name: str, classes: int = 3, **fields: Any) -> Any:
    set_seed(0)
    made = config_from_dict({**config(name), "num_labels": classes, **fields}, "student.config")
    return prepare(auto_class(name).from_config(made))


def labels_of(counts: list[int], classes: int = 3) -> list[dict[str, Tensor]]:
    """Rectangles in images of `SIZE`, so many in each."""
    made = []
    for count in counts:
        masks = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
        for place, mask in enumerate(masks):
            mask[9 * place : 9 * place + 20, 5 * place : 5 * place + 24] = True
        boxes = [[5 * place + 12, 9 * place + 10, 24, 20] for place in range(count)]
        made.append(
            {
                "class_labels": torch.arange(count) % classes,
                "boxes": torch.tensor(boxes).reshape(-1, 4) / SIZE,
                "masks": masks,
            }
        )
    return made


def loss_of(model: nn.Module, images: Tensor, labels: Any) -> Tensor:
    set_seed(1)  # most of the losses are of random points
    loss: Tensor = run_labelled(model, {"pixel_values": images, "labels": labels}).loss
    return loss


@EACH
def test_labels_of_detection_are_its_own(name: str) -> None:
    model, images, labels = native(name).eval(), torch.randn(2, 3, SIZE, SIZE), labels_of([2, 3])
    loss = loss_of(model, images, labels)
    own = [label["masks"].float() for label in labels]
    if name in UNIVERSAL:
        given: dict[str, Any] = {"mask_labels": own, "class_labels": [label["class_labels"] for label in labels]}
    else:
        given = {"labels": [{**label, "masks": mask} for label, mask in zip(labels, own, strict=True)]}
    set_seed(1)
    torch.testing.assert_close(model(pixel_values=images, **given).loss, loss)


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_objects_has_a_loss(name: str, training: bool) -> None:
    model = native(name).train(training)
    loss = loss_of(model, torch.randn(2, 3, SIZE, SIZE), labels_of([0, 0]))
    assert loss.ndim == 0 and loss.isfinite() and loss > 0
    loss.backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # RF-DETR reads its mask token nowhere, and further groups of queries in training alone
    assert not training or all(key.endswith("mask_token") for key in without)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@EACH
def test_an_image_without_labels_has_no_part_in_the_loss(name: str) -> None:
    model, images, labels = native(name).eval(), torch.randn(2, 3, SIZE, SIZE), labels_of([2, 3])
    alone = loss_of(model, images[1:], labels[1:])
    torch.testing.assert_close(loss_of(model, images, [None, labels[1]]), alone, rtol=1e-4, atol=1e-4)
    nothing = loss_of(model, images, [None, None])
    assert nothing == 0
    nothing.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@EACH
def test_one_class_is_enough(name: str) -> None:
    loss = loss_of(native(name, classes=1).eval(), torch.randn(2, 3, SIZE, SIZE), labels_of([2, 3], classes=1))
    assert loss.isfinite() and loss > 0


def test_losses_of_the_layers_of_maskformer() -> None:
    """It does not ask for the hidden states that they are made of."""
    images, labels = torch.randn(1, 3, SIZE, SIZE), labels_of([2])
    model = native("maskformer", use_auxiliary_loss=True).eval()
    more = loss_of(model, images, labels)
    assert model(images).masks_queries_logits.shape[:2] == (1, 12)
    assert more > loss_of(native("maskformer").eval(), images, labels)


@pytest.mark.parametrize("name", [name for name in NATIVE if name != "rf_detr"])  # which adds them up itself
def test_masks_are_counted_over_all_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate's `reduce` gives by default, the mean, would be divided by the number of processes once more."""

    def twice(number: Tensor, reduction: str = "mean") -> Tensor:
        """Of two processes with the same batch."""
        return number * 2 if reduction == "sum" else number

    model, images, labels = native(name).eval(), torch.randn(1, 3, SIZE, SIZE), labels_of([2])
    alone = loss_of(model, images, labels)
    module = loss_for_object_detection if name in BOXED else sys.modules[type(model).__module__]
    assert module.reduce.func is reduce
    twice.__module__ = reduce.__module__
    monkeypatch.setattr(module, "reduce", twice)
    monkeypatch.setattr(PartialState, "_shared_state", {"num_processes": 2, "device": images.device, "_cpu": True})
    assert loss_of(model, images, labels) > alone * 1.1
    prepare(model)
    torch.testing.assert_close(loss_of(model, images, labels), alone)
