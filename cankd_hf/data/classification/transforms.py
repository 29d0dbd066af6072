"""Transforms of images with one class."""

from typing import Any

import torch

from cankd_hf.data.common.batch import stack_padded
from cankd_hf.data.common.targets import NO_CLASS
from cankd_hf.data.segmentation.transforms import EvalTransform, TrainTransform


def with_class(item: dict[str, Any], label: int | None) -> dict[str, Any]:
    """An item with its class, int64 []."""
    return item if label is None else {**item, "labels": torch.tensor(label)}


class ClassTrainTransform(TrainTransform):
    """Random scale, crop, flip and colour, then normalisation; returns `pixel_values` and, with a class, `labels`."""

    def unnormalized(self, image: torch.Tensor, label: int | None) -> dict[str, Any]:  # type: ignore[override]
        return with_class(super().unnormalized(image, None), label)


class ClassEvalTransform(EvalTransform):
    """Resize to `image_size` and normalise; returns `pixel_values` and, with a class, `labels`."""

    def unnormalized(self, image: torch.Tensor, label: int | None) -> dict[str, Any]:  # type: ignore[override]
        return with_class(super().unnormalized(image, None), label)


def classification_collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples, images padded with zeros (their mean) to the largest: `pixel_values` [B, 3, h, w] and, where any
    sample has a class, `labels` int64 [B], `NO_CLASS` for those without."""
    batch = {"pixel_values": stack_padded([sample["pixel_values"] for sample in samples], 0.0)}
    if any("labels" in sample for sample in samples):
        labels = [torch.as_tensor(sample.get("labels", NO_CLASS)).reshape(()) for sample in samples]
        batch["labels"] = torch.stack(labels).long()
    return batch
