"""Collation of images with boxes, and the way back from a batch to the data set's pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from cankd_hf.data.common.batch import stack_padded

EACH = ("class_labels", "boxes", "area", "iscrowd", "masks", "outlines")  # keys of labels with a row for each object
SINGLES = "singles"


def detection_collate(samples: list[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    """Stack samples; pad images with zeros (their mean) at the right and the bottom to the largest of the batch.

    Args:
        samples: `pixel_values` [3, h, w] and, with labels, `labels` from `detection_labels`.
        multiple: H and W are rounded up to it, for models that take no other sizes.

    Returns:
        `pixel_values` [B, 3, H, W]; `pixel_mask` int64 [B, H, W], 1 on the image, only if one is padded; and `labels`,
        a list of B dicts, with None for a sample without labels; none if no sample has any. Their boxes are then
        relative to H and W, as the detectors of `transformers` expect, and their `masks` [n, H, W]; `size` is still
        that of the image without padding. Crowds come last, and `singles` [n, 0, m] says by its shape, which no device
        needs to be asked for, how many of m objects are none.
    """
    images = [sample["pixel_values"] for sample in samples]
    batch: dict[str, Any] = {"pixel_values": stack_padded(images, 0.0, multiple)}
    height, width = batch["pixel_values"].shape[-2:]
    if any(image.shape[-2:] != (height, width) for image in images):
        masks = [torch.ones(image.shape[-2:], dtype=torch.int64) for image in images]
        batch["pixel_mask"] = stack_padded(masks, 0, multiple)
    labels = [sample.get("labels") for sample in samples]
    if any(label is not None for label in labels):
        batch["labels"] = [
            None if label is None else crowds_last(_on_canvas(label, height, width)) for label in labels
        ]
    return batch


def original_sizes(labels: Sequence[Mapping[str, torch.Tensor]], height: int, width: int) -> torch.Tensor:
    """`target_sizes` for `post_process_object_detection`: boxes relative to a padded batch -> pixels of the data set.

    Returns float32 [B, 2], height and width: those of the image in the data set, with the padding at its scale.
    `height` and `width` are those of the batch's `pixel_values`.
    """
    full, resized = (torch.stack([label[key] for label in labels]).float() for key in ("orig_size", "size"))
    return full / resized * torch.tensor([height, width]).to(full.device, non_blocking=True)


def original_objects(label: Mapping[str, torch.Tensor], target_size: torch.Tensor) -> dict[str, torch.Tensor]:
    """The objects of one image of a batch, for scoring: boxes as x0, y0, x1, y1 in pixels of the data set's image.

    `target_size` [2] is its row of `original_sizes`.
    """
    centre, half = label["boxes"][:, :2], label["boxes"][:, 2:] / 2
    boxes = torch.cat([centre - half, centre + half], dim=1) * target_size.flip(0).repeat(2)
    return {**label, "boxes": boxes}


def without_crowds(labels: Sequence[Mapping[str, torch.Tensor] | None]) -> list[dict[str, torch.Tensor] | None]:
    """Labels of the single objects, for the loss: a model need not predict crowds. None stays None.

    Those that are not, or no longer, as `detection_collate` made them are looked through, for which an accelerator
    is waited for.
    """
    return [None if label is None else _cut(label) for label in labels]


def _cut(label: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    singles, crowds = label.get(SINGLES), label["iscrowd"]
    # Where a collator has added or removed objects since, the number does not hold.
    if singles is not None and singles.shape[2:] == crowds.shape:
        wanted: Any = slice(len(singles))
    else:
        wanted = crowds == 0
    return {key: value[wanted] if key in EACH else value for key, value in label.items() if key != SINGLES}


def crowds_last(label: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels on the host, with `singles`."""
    if "iscrowd" not in label:
        return label
    crowd = label["iscrowd"] != 0
    count = len(crowd) - int(crowd.sum())
    if count < len(crowd):
        order = crowd.int().argsort(stable=True)
        label = {key: value[order] if key in EACH else value for key, value in label.items()}
    return {**label, SINGLES: torch.empty(count, 0, len(crowd))}


def _on_canvas(labels: Mapping[str, torch.Tensor], height: int, width: int) -> dict[str, torch.Tensor]:
    """Labels with boxes relative to the padded image."""
    rows, columns = labels["size"].tolist()
    if (rows, columns) == (height, width):
        return dict(labels)
    made = {**labels, "boxes": labels["boxes"] * torch.tensor([columns / width, rows / height] * 2)}
    if "masks" in labels:
        made["masks"] = pad(labels["masks"], (0, width - columns, 0, height - rows))
    return made
