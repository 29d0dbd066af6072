"""Gradient checkpointing of our models, whatever their backbone supports itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .detectors import DETECTORS, detector, pictures
from .kinds import FPN_KINDS, batch, student

PVT_LOSES = "the PVTv2 of transformers passes its images by keyword, so that its first layer gets no gradient"


def model_and_inputs(kind: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    model = student(kind) if kind in FPN_KINDS else detector(kind)
    images, labels = batch() if kind in FPN_KINDS else pictures()
    return model, {"pixel_values": images, "labels": labels}


def step(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Gradients and buffers after a step in train mode, and how often each convolution or linear layer ran."""
    counts: dict[nn.Module, int] = {}
    layers = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_hook(lambda m, *_: counts.update({m: counts.get(m, 0) + 1})) for m in layers]
    torch.manual_seed(1)  # dropout, and the heads that draw samples
    model(**inputs).loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, dict(model.named_buffers()), list(counts.values())


FEW = ["resnet_fpn", "swin_fpn", "timm_psp", "hgnet_fpn", "faster_rcnn_resnet", "fcos_dinov2"]
OTHERS = [kind for kind in [*FPN_KINDS, *DETECTORS] if kind not in FEW]


@pytest.mark.parametrize("kind", [*FEW, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_gradients_nor_statistics(kind: str, reentrant: bool) -> None:
    if kind == "pvt_fpn" and reentrant:
        pytest.skip(PVT_LOSES)
    model, inputs = model_and_inputs(kind)
    assert type(model).supports_gradient_checkpointing is model.supports_gradient_checkpointing is True
    other = copy.deepcopy(model)
    other.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    assert other.is_activation_checkpointing and not model.is_activation_checkpointing
    gradients, buffers, runs = step(model, inputs)
    same, kept, more = step(other, inputs)

    assert same.keys() == gradients.keys() and all(torch.isfinite(value).all() for value in same.values())
    for name, value in gradients.items():
        torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in buffers.items():
        torch.testing.assert_close(kept[name], value, msg=name)
    assert max(runs) == 1 and max(more) > 1  # the backbone ran again in the backward pass


def test_checkpointing_is_switched_off_again_and_rests_in_evaluation() -> None:
    model, inputs = model_and_inputs("resnet_fpn")
    model.activation_checkpointing_enable()
    model.eval()
    assert max(step(model, inputs)[2]) == 1
    model.train().activation_checkpointing_disable()
    assert not model.is_activation_checkpointing and max(step(model, inputs)[2]) == 1


def test_an_error_in_the_second_run_leaves_the_norms_counting() -> None:
    model, inputs = model_and_inputs("resnet_fpn")
    model.activation_checkpointing_enable()
    loss = model(**inputs).loss
    conv = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))

    def fail(*_: Any) -> None:
        raise ValueError("again")

    conv.register_forward_hook(fail)
    with pytest.raises(ValueError, match="again"):
        loss.backward()
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.momentum == 0.1 and int(norm.num_batches_tracked) == 1 for norm in norms)
