"""Predictions of detectors: of a dense one at all anchors (its forward takes `output_dense`), of others by query."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cankd_hf.features.auto_taps import quiet_forward

# Model types with a softmax whose last class is "no object"; all others, ours too, have a sigmoid per class (those
# with a text prompt: for each word of each class).
SOFTMAX = {"detr", "table-transformer", "yolos"}
CENTRES = (
    "centres"  # of the anchors, [A, 2] in 0..1: the same for all images, so no part of what is stored of a teacher
)


def dense_of(output: Any) -> Mapping[str, Tensor] | None:
    """The dense predictions in a model's output, if it has any."""
    return output.get("dense") if isinstance(output, Mapping) else None


def by_image(dense: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The part of dense predictions that is of each image, `[B, ...]`."""
    return None if dense is None else {name: value for name, value in dense.items() if name != CENTRES}


def selects_detections(model: nn.Module) -> bool:
    """Whether a model's `logits` are of detections that it selects, in eval mode only, instead of all predictions."""
    return "output_dense" in inspect.signature(model.forward).parameters


def dense_shape(model: nn.Module, image_size: tuple[int, int], **kwargs: Any) -> torch.Size | None:
    """The shape [1, A, K] of a model's dense class logits for one image; None for a model without them."""
    if not selects_detections(model):
        return None
    found = dense_of(quiet_forward(model, image_size, output_dense=True, **kwargs))
    return None if found is None else found["class_logits"].shape


def queries_of(output: Any, model: nn.Module, training: bool) -> dict[str, Tensor] | None:
    """The predictions of a detector with queries: `class_logits` [B, N, K] and `boxes` [B, N, 4] (centre, size).

    None of other models, and of those whose classes are words of a prompt. Denoising queries, which some add in
    training, are left out; groups of queries, of which others train several, become images: [B * groups, N, K].
    """
    config = getattr(model, "config", None)
    logits, boxes = (output.get(key) if isinstance(output, Mapping) else None for key in ("logits", "pred_boxes"))
    prompted = isinstance(output, Mapping) and output.get("input_ids") is not None
    if logits is None or boxes is None or prompted or selects_detections(model):
        return None
    denoising = output.get("denoising_meta_values")
    if denoising is not None:
        own = int(denoising["dn_num_split"][1])
        logits, boxes = logits[:, -own:], boxes[:, -own:]
    groups = getattr(config, "group_detr", 1) if training else 1
    if groups > 1:
        logits, boxes = (x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (logits, boxes))
    return {"class_logits": logits, "boxes": boxes}


def queries_shape(model: nn.Module, image_size: tuple[int, int], **kwargs: Any) -> torch.Size | None:
    """The shape [1, N, K] of the class logits of a model's queries for one image; None for a model without them."""
    found = queries_of(quiet_forward(model, image_size, **kwargs), model, training=False)
    return None if found is None else found["class_logits"].shape


def head_activation(model: nn.Module, dimensions: int) -> Literal["sigmoid", "softmax"]:
    """What makes probabilities of a model's logits: of those of detections `[B, N, K]` mostly a sigmoid a class."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    return "sigmoid" if dimensions == 3 and kind not in SOFTMAX else "softmax"
