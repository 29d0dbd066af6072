"""The loss of a detector where only some images of a batch have labels: the others are cut out of it.

An image without labels is not one without objects: it has no part in the loss, and none in what the loss is divided
by. The images go through the model together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.models.fpn.detection_heads_cankd_fpn import labelled, rows_of
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection

Labels = Sequence[Mapping[str, Tensor] | None]
# Arguments of the losses of transformers with a row for each decoder layer, and then one for each image; in those
# of the RT-DETR family, which also pass denoising queries, it is the other way round.
STACKED = ("outputs_class", "outputs_coord")


def labelled_rows(labels: Any) -> list[int] | None:
    """The images that have labels, where these are a list with None for the others; None where all are labelled."""
    return labelled(labels) if isinstance(labels, list | tuple) else None


def run_labelled(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's output for its `inputs`, with the loss of those images whose entry in `labels` is not None.

    In a batch without any labels the loss is 0, with a gradient of 0.

    Raises:
        InputError: if the model computes its loss in another way than the detectors of transformers and ours.
    """
    labels = inputs.get("labels")
    rows = labelled_rows(labels)
    if rows is None:
        return model(**inputs)
    if not rows:
        output = model(**{**inputs, "labels": [nothing_on(inputs["pixel_values"].device)] * len(labels)})
        output["loss"] = output["loss"] * 0
        return output
    if isinstance(model, FPNForObjectDetection):
        return model(**inputs)
    filled = [_without_objects(labels[rows[0]]) if label is None else label for label in labels]
    return _run_native(model, {**inputs, "labels": filled}, lambda loss, given: loss(**of_rows(given, rows)))


def nothing_on(device: torch.device) -> dict[str, Tensor]:
    """Labels of an image without objects."""
    return {
        "class_labels": torch.zeros(0, dtype=torch.int64, device=device),
        "boxes": torch.zeros(0, 4, device=device),
    }


def _without_objects(label: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return nothing_on(label["boxes"].device)


def _run_native(
    model: nn.Module, inputs: Mapping[str, Any], loss_of: Callable[[Callable[..., Any], dict[str, Any]], Any]
) -> Any:
    """A forward pass of a detector of transformers whose loss function is called by `loss_of`, with its arguments."""
    own = getattr(model, "loss_function", None)
    called = []

    def loss(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        bound = inspect.signature(own).bind(*args, **kwargs)  # type: ignore[arg-type]
        given = dict(bound.arguments)
        return loss_of(own, {**given, **given.pop("kwargs", {})})  # type: ignore[arg-type]

    if own is not None:
        model.loss_function = loss  # type: ignore[assignment]
    try:
        output = model(**inputs)
    finally:
        if own is not None:
            model.loss_function = own
    if not called:
        raise InputError(
            f"data.unlabelled: expected a student whose loss can leave images out, got {type(model).__name__}, which "
            "does not call its `loss_function`; take one of the detectors of transformers or ours"
        )
    return output


def of_rows(given: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The arguments of a loss function of transformers for some images of the batch."""
    batch, second = len(given["labels"]), "denoising_meta_values" in given
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name == "denoising_meta_values" and value is not None:
            places = value["dn_positive_idx"]
            chosen[name] = {**value, "dn_positive_idx": [places[row] for row in rows]}
        elif name in STACKED and isinstance(value, Tensor) and not second:
            chosen[name] = rows_of(value.transpose(0, 1), rows).transpose(0, 1)
        elif isinstance(value, Tensor) and value.ndim and len(value) == batch:
            chosen[name] = rows_of(value, rows)
        elif isinstance(value, list | tuple) and len(value) == batch:
            chosen[name] = [value[row] for row in rows]
        else:
            chosen[name] = value
    return chosen
