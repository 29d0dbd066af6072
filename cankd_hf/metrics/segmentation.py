"""Segmentation scores from three areas a class: exact for any number of processes, without keeping logits."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from cankd_hf.metrics.names import class_keys


@torch.no_grad()
def segmentation_areas(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    ignore_index: int = 255,
    label_sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Count pixels of each class: correctly predicted, predicted, and labelled.

    These are the diagonal, the column sums and the row sums of the confusion matrix: all that IoU and accuracies need.
    They can be summed exactly over images, batches and processes.

    Args:
        logits: [B, K, h, w]; resized to the size of the labels.
        labels: [B, H, W], 0..K-1 or `ignore_index`.
        num_labels: K.
        ignore_index: pixels with this label do not count.
        label_sizes: [B, 2], height and width of each image's mask in `labels`, where these are padded and the logits
            cover only the mask; None: logits cover all of `labels`.

    Returns:
        int64 [B, 3, K]: intersection, predicted, labelled; on the device of `logits`.

    Raises:
        ValueError: for a label that is neither a class nor `ignore_index`.
    """
    sizes = [list(labels.shape[-2:])] * len(labels) if label_sizes is None else label_sizes.tolist()
    rows = []
    for image_logits, image_labels, (height, width) in zip(logits, labels, sizes, strict=True):
        target = image_labels[:height, :width]
        resized = image_logits[None].float()
        if resized.shape[-2:] != target.shape:
            resized = interpolate(resized, size=(height, width), mode="bilinear", align_corners=False)
        rows.append(prediction_areas(resized[0].argmax(0), target, num_labels, ignore_index))
    return torch.stack(rows)


@torch.no_grad()
def prediction_areas(
    prediction: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_index: int = 255
) -> torch.Tensor:
    """`segmentation_areas` [3, K] of one image, from its predicted classes [H, W] in 0..K-1. Raises ValueError for a
    label that is neither a class nor `ignore_index`, or maps of two sizes."""
    if prediction.shape != labels.shape:
        raise ValueError(f"expected maps of one size, got {tuple(prediction.shape)} and {tuple(labels.shape)}")
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= num_labels))
    if outside.any():
        raise ValueError(f"label {labels[outside][0].item()} is neither in 0..{num_labels - 1} nor {ignore_index}")
    # bin K collects the pixels that do not count
    counted = labels != ignore_index
    predicted = torch.where(counted, prediction, num_labels)
    labelled = torch.where(counted, labels, num_labels)
    hit = torch.where(prediction == labels, labelled, num_labels)
    areas = [torch.bincount(part.flatten(), minlength=num_labels + 1) for part in (hit, predicted, labelled)]
    return torch.stack(areas)[:, :num_labels]


def segmentation_scores(areas: torch.Tensor | np.ndarray, id2label: dict[int, str]) -> dict[str, float]:
    """Scores of a whole set.

    Args:
        areas: [..., 3, K], from `segmentation_areas`; summed over all leading dimensions.
        id2label: names of the K classes.

    Returns:
        `miou`: mean IoU over the classes that occur in labels or predictions; `pixel_accuracy`; `mean_accuracy`: mean
        recall over the labelled classes; `iou_NAME` for each class (see `class_keys`), nan for one that does not
        occur. In 0..1.

    Raises:
        ValueError: if the areas are not [..., 3, K] with K names.
    """
    counts = areas.detach().cpu().numpy() if isinstance(areas, torch.Tensor) else np.asarray(areas)
    if counts.ndim < 2 or counts.shape[-2:] != (3, len(id2label)):
        raise ValueError(f"expected areas [..., 3, {len(id2label)}] for {len(id2label)} classes, got {counts.shape}")
    hit, predicted, labelled = counts.reshape(-1, *counts.shape[-2:]).sum(0, dtype=np.int64)
    union = predicted + labelled - hit
    iou = np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)
    recall = np.divide(hit, labelled, out=np.full(len(hit), np.nan), where=labelled > 0)
    scores = {
        "miou": _mean(iou),
        "pixel_accuracy": float(hit.sum() / labelled.sum()) if labelled.sum() else float("nan"),
        "mean_accuracy": _mean(recall),
    }
    return scores | {key: float(iou[index]) for index, key in class_keys("iou", id2label, scores).items()}


def _mean(values: np.ndarray) -> float:
    """`np.nanmean`, without its warning where all are nan."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
