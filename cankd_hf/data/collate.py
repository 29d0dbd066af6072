"""From samples to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad


def segmentation_collate(samples: list[dict[str, torch.Tensor]], ignore_index: int = 255) -> dict[str, torch.Tensor]:
    """Stack samples; pad images with zeros (their mean) and labels with void to the largest of the batch.

    Args:
        samples: `pixel_values` [3, h, w] and, with labels, `labels` [H, W] each.
        ignore_index: label of the padding.

    Returns:
        `pixel_values` [B, 3, h, w]; `labels` [B, H, W] where all samples have labels; and `label_sizes` [B, 2]
        (height, width of each mask) where the masks differ in size from their images: scores are then taken on each
        mask's own grid. Where images are not resized, both are padded alike and no `label_sizes` are needed.
    """
    batch = {"pixel_values": _stack([sample["pixel_values"] for sample in samples], 0.0)}
    if all("labels" in sample for sample in samples):
        labels = [sample["labels"] for sample in samples]
        batch["labels"] = _stack(labels, ignore_index)
        if any(sample["labels"].shape != sample["pixel_values"].shape[-2:] for sample in samples):
            batch["label_sizes"] = torch.tensor([list(label.shape) for label in labels])
    return batch


class SegmentationCollator:
    """`segmentation_collate` with its ignore index, picklable for loading processes."""

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return segmentation_collate(samples, self.ignore_index)


def detection_collate(samples: list[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    """Stack samples; pad images with zeros (their mean) at the right and the bottom to the largest of the batch.

    Args:
        samples: `pixel_values` [3, h, w] and, with labels, `labels` as of `detection_labels`.
        multiple: of which H and W shall be, for models that take no other sizes.

    Returns:
        `pixel_values` [B, 3, H, W]; `pixel_mask` int64 [B, H, W], 1 where there is image, only if one is padded; and
        `labels`, a list of B dicts, where all samples have labels. Their boxes are then shares of H and W, as the
        detectors of `transformers` expect; `size` is still that of the image inside.
    """
    images = [sample["pixel_values"] for sample in samples]
    batch: dict[str, Any] = {"pixel_values": _stack(images, 0.0, multiple)}
    height, width = batch["pixel_values"].shape[-2:]
    if any(image.shape[-2:] != (height, width) for image in images):
        masks = [torch.ones(image.shape[-2:], dtype=torch.int64) for image in images]
        batch["pixel_mask"] = _stack(masks, 0, multiple)
    if all("labels" in sample for sample in samples):
        batch["labels"] = [_on_canvas(sample["labels"], height, width) for sample in samples]
    return batch


def original_sizes(labels: Sequence[Mapping[str, torch.Tensor]], height: int, width: int) -> torch.Tensor:
    """Sizes that bring boxes given as shares of a padded batch to pixels of the data set's images.

    They are what `post_process_object_detection` takes as `target_sizes`.

    Args:
        labels: of the batch.
        height: of the batch's `pixel_values`.
        width: the same.

    Returns:
        float32 [B, 2], height and width: those of the image in the data set, with the padding at its scale.
    """
    rows = [label["orig_size"].float() / label["size"].float() for label in labels]
    return torch.stack(rows) * torch.tensor([height, width], device=rows[0].device)


def original_objects(label: Mapping[str, torch.Tensor], target_size: torch.Tensor) -> dict[str, torch.Tensor]:
    """The objects of one image of a batch for the score: boxes as x0, y0, x1, y1 in pixels of the data set's image.

    Args:
        label: of the image.
        target_size: [2], its row of `original_sizes`.
    """
    centre, half = label["boxes"][:, :2], label["boxes"][:, 2:] / 2
    boxes = torch.cat([centre - half, centre + half], dim=1) * target_size.flip(0).repeat(2)
    return {**label, "boxes": boxes}


def without_crowds(labels: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Labels of the single objects alone, for the loss: a crowd is no object a model should give."""
    each = ("class_labels", "boxes", "area", "iscrowd")
    return [
        {key: value[label["iscrowd"] == 0] if key in each else value for key, value in label.items()}
        for label in labels
    ]


def _on_canvas(labels: Mapping[str, torch.Tensor], height: int, width: int) -> dict[str, torch.Tensor]:
    """Labels whose boxes are shares of the padded image."""
    rows, columns = labels["size"].tolist()
    if (rows, columns) == (height, width):
        return dict(labels)
    return {**labels, "boxes": labels["boxes"] * torch.tensor([columns / width, rows / height] * 2)}


def _stack(tensors: list[torch.Tensor], fill: float, multiple: int = 1) -> torch.Tensor:
    """Stack [..., h, w] tensors, padded at the right and the bottom to the largest, rounded up to a multiple."""
    height, width = (-(-max(tensor.shape[side] for tensor in tensors) // multiple) * multiple for side in (-2, -1))
    return torch.stack(
        [
            tensor
            if tensor.shape[-2:] == (height, width)
            else pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]), value=fill)
            for tensor in tensors
        ]
    )
