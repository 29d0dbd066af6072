"""A dense detector's predictions at all anchors, from models whose forward takes `output_dense`."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cankd_hf.features.auto_taps import quiet_forward


def dense_of(output: Any) -> Mapping[str, Tensor] | None:
    """The dense predictions in a model's output, if it has any."""
    return output.get("dense") if isinstance(output, Mapping) else None


def selects_detections(model: nn.Module) -> bool:
    """Whether a model's `logits` are of detections that it selects, in eval mode only, instead of all predictions."""
    return "output_dense" in inspect.signature(model.forward).parameters


def dense_shape(model: nn.Module, image_size: tuple[int, int], **kwargs: Any) -> torch.Size | None:
    """The shape [1, A, K] of a model's dense class logits for one image; None for a model without them."""
    if not selects_detections(model):
        return None
    found = dense_of(quiet_forward(model, image_size, output_dense=True, **kwargs))
    return None if found is None else found["class_logits"].shape
