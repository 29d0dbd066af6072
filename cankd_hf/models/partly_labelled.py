"""The loss of a detector where only some images of a batch have labels: the others are cut out of it.

An image without labels is not one without objects: it has no part in the loss, and none in what the loss is divided
by. The images go through the model together. Some that have no labels may have pseudo-labels, which give a loss of
their own in the same pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from cankd_hf.errors import InputError
from cankd_hf.models.fpn.detection_heads_cankd_fpn import DenseDetector, labelled, rows_of
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection

# Arguments of the losses of transformers with a row for each decoder layer, and then one for each image; in those
# of the RT-DETR family, which also pass denoising queries, it is the other way round.
STACKED = ("outputs_class", "outputs_coord")
LAYERS = ("outputs_masks", "auxiliary_predictions", "auxiliary_logits")  # lists of what each decoder layer predicted
GIVEN = ("labels", "class_labels", "mask_labels")  # of these arguments, labels of each image
OF_OBJECTS = ("class_labels", "boxes", "masks")  # a row for each object
# Class logits and boxes of the same queries among these arguments.
PREDICTED = {
    "logits": "pred_boxes",
    "outputs_class": "outputs_coord",
    "enc_topk_logits": "enc_topk_bboxes",
    "enc_outputs_class": "enc_outputs_coord",
    "encoder_logits": "encoder_pred_boxes",
}
SAME_OBJECT = 0.5  # overlap of a query's box with an uncertain one from which it may be that object
UNLIKELY = -10.0  # largest logit of what is left out: far below the prior of any head
PSEUDO = "pseudo_loss"  # in a model's output
Label = Mapping[str, Tensor]
Labels = Sequence[Label | None]


def labelled_rows(labels: Any) -> list[int] | None:
    """The images that have labels, where these are a list with None for the others; None where all are labelled."""
    return labelled(labels) if isinstance(labels, list | tuple) else None


def run_labelled(model: nn.Module, inputs: Mapping[str, Any], pseudo: Labels | None = None) -> Any:
    """The model's output for its `inputs`, with the loss of those images whose entry in `labels` is not None.

    In a batch without any labels the loss is 0, with a gradient of 0.

    Args:
        model: a detector of transformers or of ours; any model where all images have labels.
        inputs: of its forward.
        pseudo: for each image None, or labels with `uncertain` [m, 4]: corners of boxes (0..1) that may be objects.
            What is predicted there, and is no part of a labelled object, has no part in the loss. The output gets a
            second loss, `pseudo_loss`, of these images.

    Raises:
        InputError: if the model computes its loss in another way, or it cannot leave uncertain boxes out.
    """
    labels = inputs.get("labels")
    if labels is None or (pseudo is None and labelled_rows(labels) is None):
        return model(**inputs)
    if isinstance(model, FPNForObjectDetection):
        return _run_ours(model, inputs, labels, pseudo)
    return _run_native(model, inputs, labels, pseudo)


def divides_alone(model: nn.Module) -> bool:
    """Whether a model's loss is divided by what its own process has: that of our heads is, that of the DETR family by
    the mean over the processes."""
    return isinstance(model, FPNForObjectDetection)


def without_objects(pixels: Tensor) -> dict[str, Tensor]:
    """Labels of an image without objects, in a batch of images [B, 3, H, W]."""
    return {
        "class_labels": torch.zeros(0, dtype=torch.int64, device=pixels.device),
        "boxes": torch.zeros(0, 4, device=pixels.device),
        "masks": torch.zeros(0, *pixels.shape[-2:], dtype=torch.bool, device=pixels.device),
    }


def _merged(labels: Labels, pseudo: Labels | None) -> list[Label | None]:
    """The labels of each image, its own or pseudo-labels."""
    others = pseudo if pseudo is not None else [None] * len(labels)
    return [other if label is None else label for label, other in zip(labels, others, strict=True)]


def _rows(labels: Labels) -> list[int]:
    return [row for row, label in enumerate(labels) if label is not None]


# Detectors of transformers: their forward calls `loss_function` with what it predicted, Mask2Former and its kin
# `get_loss_dict`


def _run_native(model: nn.Module, inputs: Mapping[str, Any], labels: Labels, pseudo: Labels | None) -> Any:
    empty = without_objects(inputs["pixel_values"])
    filled = [empty if label is None else label for label in _merged(labels, pseudo)]
    second: list[Tensor] = []

    def loss(own: Callable[..., Any], given: dict[str, Any]) -> Any:
        if pseudo is not None:
            second.append(_of(own, given, _rows(pseudo), pseudo)[0])
        return _of(own, given, _rows(labels))

    output = _hooked(model, {**inputs, "labels": filled}, loss)
    if second:
        output[PSEUDO] = second[0]
    return output


def _hooked(
    model: nn.Module, inputs: Mapping[str, Any], loss_of: Callable[[Callable[..., Any], dict[str, Any]], Any]
) -> Any:
    """A forward pass with `loss_of(loss function, its arguments)` in the place of the model's loss function."""
    name = "get_loss_dict" if hasattr(model, "get_loss_dict") else "loss_function"
    own = getattr(model, name, None)
    called = []

    def loss(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        given = dict(inspect.signature(own).bind(*args, **kwargs).arguments)  # type: ignore[arg-type]
        return loss_of(own, {**given, **given.pop("kwargs", {})})  # type: ignore[arg-type]

    if own is not None:
        setattr(model, name, loss)
    try:
        output = model(**inputs)
    finally:
        if own is not None:
            setattr(model, name, own)
    if not called:
        raise InputError(
            f"data.unlabelled: expected a student whose loss can leave images out, got {type(model).__name__}, which "
            "does not call its `loss_function`; take one of the detectors of transformers or ours"
        )
    return output


def _of(own: Callable[..., Any], given: dict[str, Any], rows: list[int], pseudo: Labels | None = None) -> Any:
    """The loss of some images; 0 for none. It is called all the same: the processes add up their boxes in it."""
    if not rows:
        found = own(**{**given, **{name: [_emptied(one) for one in given[name]] for name in GIVEN if name in given}})
        if isinstance(found, dict):
            return {name: loss * 0 for name, loss in found.items()}
        return (found[0] * 0, *found[1:])
    some = of_rows(given, rows)
    if pseudo is not None:
        labels = [label for label in pseudo if label is not None]
        some = _without_uncertain({**some, "labels": labels}, labels)
    return own(**some)


def _emptied(labels: Any) -> Any:
    """The labels of an image, or one of its tensors, without its objects."""
    if isinstance(labels, Tensor):
        return labels[:0]
    return {name: value[:0] if name in OF_OBJECTS else value for name, value in labels.items()}


def of_rows(given: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The arguments of a loss function of transformers for some images of the batch."""
    batch = len(next(given[name] for name in GIVEN if name in given))
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name == "denoising_meta_values" and value is not None:
            places = value["dn_positive_idx"]
            chosen[name] = {**value, "dn_positive_idx": [places[row] for row in rows]}
        elif name in LAYERS and value is not None:
            chosen[name] = [_rows_of_layer(layer, rows) for layer in value]
        elif isinstance(value, Tensor) and _layers_first(name, given):
            chosen[name] = rows_of(value.transpose(0, 1), rows).transpose(0, 1)
        elif isinstance(value, Tensor) and value.ndim and len(value) == batch:
            chosen[name] = rows_of(value, rows)
        elif isinstance(value, list | tuple) and len(value) == batch:
            chosen[name] = [value[row] for row in rows]
        else:
            chosen[name] = value
    return chosen


def _rows_of_layer(layer: Tensor | Mapping[str, Tensor], rows: Sequence[int]) -> Any:
    if isinstance(layer, Tensor):
        return rows_of(layer, rows)
    return {name: rows_of(value, rows) for name, value in layer.items()}


def _layers_first(name: str, given: Mapping[str, Any]) -> bool:
    return name in STACKED and "denoising_meta_values" not in given


def _without_uncertain(given: dict[str, Any], labels: Sequence[Label]) -> dict[str, Any]:
    """The arguments with no gradient for the classes of queries that may be an uncertain object."""
    changed = dict(given)
    denoising = (given.get("denoising_meta_values") or {}).get("dn_num_split", [0])[0]
    for name, of_boxes in PREDICTED.items():
        logits, boxes = given.get(name), given.get(of_boxes)
        if not isinstance(logits, Tensor) or not isinstance(boxes, Tensor):
            continue
        first = _layers_first(name, given)
        left_out = torch.stack(
            [
                _may_be_uncertain(one.detach(), label)
                for one, label in zip(boxes.transpose(0, 1) if first else boxes, labels, strict=True)
            ]
        )
        if name in ("logits", "outputs_class"):
            left_out[..., :denoising] = False
        left_out = left_out.transpose(0, 1) if first else left_out
        changed[name] = torch.where(left_out[..., None], _nothing_there(logits, given["config"]), logits)
    return changed


def _may_be_uncertain(boxes: Tensor, label: Label) -> Tensor:
    """Whether boxes [..., 4] (centre, size) overlap an uncertain box, and more than any labelled one: bool [...]."""
    flat = box_convert(boxes.reshape(-1, 4).float(), "cxcywh", "xyxy")

    def best(of: Tensor) -> Tensor:
        return box_iou(flat, of.float()).amax(1) if len(of) else flat.new_zeros(len(flat))

    unsure, sure = best(label["uncertain"]), best(box_convert(label["boxes"], "cxcywh", "xyxy"))
    return ((unsure >= SAME_OBJECT) & (unsure > sure)).view(boxes.shape[:-1])


def _nothing_there(logits: Tensor, config: Any) -> Tensor:
    """Logits of the same shape that tell of no object, without gradient."""
    still = logits.detach()
    if logits.shape[-1] == config.num_labels + 1:  # a softmax, whose last class is "no object"
        sure = torch.zeros_like(still)
        sure[..., -1] = -UNLIKELY
        return sure
    return still.clamp(max=UNLIKELY)


# Our own detectors: their head's `losses` is called with what it predicted


def _run_ours(model: FPNForObjectDetection, inputs: Mapping[str, Any], labels: Labels, pseudo: Labels | None) -> Any:
    known, device = _merged(labels, pseudo), inputs["pixel_values"].device
    given = known if _rows(known) else [without_objects(inputs["pixel_values"])] * len(labels)
    if pseudo is None:
        output = model(**{**inputs, "labels": given})
        output["loss"] = output["loss"] if _rows(labels) else output["loss"] * 0
        return output
    if not isinstance(model.head, DenseDetector):
        head = model.config.head
        raise InputError(
            f"pseudo_boxes: expected a student whose loss can leave uncertain boxes out, got the head {head}; "
            "take fcos, retinanet or reppoints, or a DETR-like detector"
        )
    (height, width), _ = model.map_frame((inputs["pixel_values"].shape[-2], inputs["pixel_values"].shape[-1]))
    scale = torch.tensor([width, height] * 2, dtype=torch.float32).to(device, non_blocking=True)
    second: list[Tensor] = []

    def losses(targets: Any, _: Any, outputs: Any, anchors: Any, counts: Any) -> Any:
        """Of labelled images, and beside them of those with pseudo-labels."""
        # in training the head may have been given only the images with labels of either kind
        rows = range(len(labels)) if len(targets) == len(labels) else _rows(given)
        head = model.head, (targets, outputs, anchors, counts)
        own = _losses_of(*head, [place for place, row in enumerate(rows) if labels[row] is not None])
        chosen = [place for place, row in enumerate(rows) if labels[row] is None and pseudo[row] is not None]
        unsure = [label["uncertain"] * scale for label in pseudo if label is not None]
        second.append(torch.stack(list(_losses_of(*head, chosen, unsure).values())).sum())
        return own

    model.head.losses = losses  # type: ignore[method-assign, assignment]
    try:
        output = model(**{**inputs, "labels": given})
    finally:
        del model.head.losses
    output[PSEUDO] = second[0]
    return output


def _losses_of(
    head: DenseDetector, given: tuple[Any, ...], rows: list[int], unsure: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """A head's losses of some images, 0 of none; `unsure`: their uncertain boxes."""
    targets, outputs, anchors, counts = given
    logits = outputs["cls_logits"]
    mine = [targets[row] for row in rows] or [_nothing(logits.device)] * len(logits)
    some = {name: rows_of(value, rows) for name, value in outputs.items()} if rows else dict(outputs)
    if unsure:
        some["cls_logits"] = _certain_logits(some["cls_logits"], anchors[0], mine, unsure)
    found = type(head).losses(head, mine, None, some, anchors[: len(mine)], counts)
    return found if rows else {name: value * 0 for name, value in found.items()}


def _nothing(device: torch.device) -> dict[str, Tensor]:
    return {"boxes": torch.zeros(0, 4, device=device), "labels": torch.zeros(0, dtype=torch.int64, device=device)}


def _certain_logits(logits: Tensor, anchors: Tensor, targets: Sequence[Label], unsure: Sequence[Tensor]) -> Tensor:
    """Class logits [B, A, K] without gradient where an anchor's centre lies in an uncertain box and in no labelled
    one. All boxes are corners in pixels; anchors are boxes [A, 4], or centre and stride [A, 3]."""
    centres = anchors[:, :2] if anchors.shape[1] == 3 else (anchors[:, :2] + anchors[:, 2:]) / 2

    def within(boxes: Tensor) -> Tensor:
        inside = (centres[:, None] >= boxes[:, :2]) & (centres[:, None] <= boxes[:, 2:])
        return inside.all(-1).any(-1)

    left_out = torch.stack([within(u) & ~within(t["boxes"]) for u, t in zip(unsure, targets, strict=True)])
    return torch.where(left_out[..., None], logits.detach().clamp(max=UNLIKELY), logits)
