"""The losses of DINO: focal classification, L1 and GIoU of every decoder layer, the encoder's proposals and denoising.

This file travels with every saved detector, so it imports nothing of `cankd_hf`. Letters in shapes: B batch, L decoder
layers, D denoising queries, N matched queries, K classes, n objects of an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

Labels = Sequence[dict[str, Tensor]]
Places = list[tuple[Tensor, Tensor]]  # of each image: queries, and the objects that they belong to


class DINOImageLoss(DeformableDetrImageLoss):
    """As in Deformable DETR, with the losses of denoising queries, whose objects are known."""

    def get_loss(
        self, loss: str, outputs: Any, targets: Labels, indices: Places, num_boxes: float
    ) -> dict[str, Tensor]:
        """One loss; what it is divided by, a mean over the processes, is kept for the denoising queries."""
        self.num_boxes = num_boxes
        return super().get_loss(loss, outputs, targets, indices, num_boxes)

    def denoising(self, outputs: Any, targets: Labels, places: Places, groups: int) -> dict[str, Tensor]:
        """The losses of the denoising queries of one layer, after those of the matched queries."""
        found: dict[str, Tensor] = {}
        for loss in self.losses:
            found |= super().get_loss(loss, outputs, targets, places, self.num_boxes * groups)
        return found


def denoised_places(labels: Labels, denoising: dict[str, Any]) -> Places:
    """The positive denoising queries of each image and their objects, group by group."""
    places = []
    for label, positive in zip(labels, denoising["dn_positive_idx"], strict=True):
        objects = torch.arange(len(label["class_labels"]), device=positive.device).repeat(denoising["dn_num_group"])
        places.append((positive[: len(objects)], objects))  # none of an image whose labels are left out
    return places


def dino_loss(
    logits: Tensor,
    labels: Labels,
    device: torch.device,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    enc_topk_logits: Tensor | None = None,
    enc_topk_bboxes: Tensor | None = None,
    denoising_meta_values: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
    """The loss of DINO, with the arguments of the RT-DETR family's in `transformers`.

    Args:
        logits: `[B, D + N, K]` of the last layer, denoising queries first.
        labels: of each image, `class_labels` `[n]` and `boxes` `[n, 4]` (centre, size, in 0..1).
        device: unused; it is the logits'.
        pred_boxes: `[B, D + N, 4]` of the last layer.
        config: a `DINOConfig`.
        outputs_class: `[B, L, D + N, K]` of all layers.
        outputs_coord: `[B, L, D + N, 4]`.
        enc_topk_logits: `[B, N, K]` of the encoder's proposals.
        enc_topk_bboxes: `[B, N, 4]`.
        denoising_meta_values: of the denoising queries: `dn_positive_idx` of each image, `dn_num_group` and
            `dn_num_split` (D, N); None without any.
        kwargs: ignored, for callers that pass the same to every loss.

    Returns:
        The loss [], its weighted parts, which add up to it, and the predictions of the auxiliary losses.
    """
    first = 0 if denoising_meta_values is None else denoising_meta_values["dn_num_split"][0]
    costs = {name: getattr(config, name) for name in ("class_cost", "bbox_cost", "giou_cost")}
    matcher = DeformableDetrHungarianMatcher(**costs)
    criterion = DINOImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"])
    layers = [outputs_of(logits, pred_boxes)]
    if config.auxiliary_loss:
        assert outputs_class is not None and outputs_coord is not None
        layers = [outputs_of(*pair) for pair in zip(outputs_class.unbind(1), outputs_coord.unbind(1), strict=True)]
    *earlier, last = ({name: value[:, first:] for name, value in layer.items()} for layer in layers)
    auxiliary = [*earlier, outputs_of(enc_topk_logits, enc_topk_bboxes)]
    raw = criterion({**last, "auxiliary_outputs": auxiliary}, labels)
    encoder = f"_{len(earlier)}"
    named = {key.removesuffix(encoder) + "_encoder" if key.endswith(encoder) else key: raw[key] for key in raw}
    if denoising_meta_values is not None:
        places = denoised_places(labels, denoising_meta_values)
        for number, layer in enumerate(layers):
            known = {name: value[:, :first] for name, value in layer.items()}
            found = criterion.denoising(known, labels, places, denoising_meta_values["dn_num_group"])
            named |= {f"{key}_denoising_{number}": value for key, value in found.items()}
    parts = {key: value * weight_of(key, config) for key, value in named.items()}
    return torch.stack(list(parts.values())).sum(), parts, auxiliary


def outputs_of(logits: Any, boxes: Any) -> dict[str, Tensor]:
    """Predictions in float32, as the losses of `transformers` take them."""
    return {"logits": logits.float(), "pred_boxes": boxes.float()}


def weight_of(key: str, config: Any) -> float:
    """The weight of one part of the loss, by its name."""
    kinds = {"loss_ce": "class", "loss_bbox": "bbox", "loss_giou": "giou"}
    (kind,) = (kinds[start] for start in kinds if key.startswith(start))
    weight: float = getattr(config, f"{kind}_loss_coefficient")
    for part in ("encoder", "denoising"):
        if f"_{part}" in key:
            weight *= getattr(config, f"{part}_loss_coefficient")
    return weight
