"""Collation of images with masks."""

from typing import Any

import numpy as np
import torch

from cankd_hf.data.common.batch import stack_padded


def segmentation_collate(samples: list[dict[str, torch.Tensor]], ignore_index: int = 255) -> dict[str, Any]:
    """Stack samples; pad images with zeros (their mean) and labels with void to the largest of the batch.

    Args:
        samples: `pixel_values` [3, h, w] and, with labels, `labels` [H, W] each.
        ignore_index: label of the padding.

    Returns:
        `pixel_values` [B, 3, h, w]; `labels` [B, H, W] where any sample has labels, void for those without; and
        `label_sizes` [B, 2] (height, width of each mask) where the masks differ in size from one another and from
        their images, so that each is scored on its own grid. Where images are not resized, both are padded alike and
        need no `label_sizes`.
        These are an array, which stays on the host when a batch moves, so that no accelerator is waited for.
    """
    images = [sample["pixel_values"] for sample in samples]
    batch: dict[str, Any] = {"pixel_values": stack_padded(images, 0.0)}
    if any("labels" in sample for sample in samples):
        dtype = next(sample["labels"].dtype for sample in samples if "labels" in sample)
        labels = [
            sample["labels"] if "labels" in sample else torch.full(image.shape[-2:], ignore_index, dtype=dtype)
            for sample, image in zip(samples, images, strict=True)
        ]
        batch["labels"] = stack_padded(labels, ignore_index)
        padded = len({label.shape for label in labels}) > 1
        if padded and any(label.shape != image.shape[-2:] for label, image in zip(labels, images, strict=True)):
            batch["label_sizes"] = np.array([label.shape for label in labels])
    return batch
