"""Segmentation scores from three areas a class: exact for any number of processes, without keeping logits."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from cankd_hf.metrics.names import class_keys

# Stands for the areas of an image with a wrong label, where reading them would make an accelerator wait: below 0 also
# in a sum with the areas of a trillion pixels.
WRONG_LABEL = -(2**40)
BLOCK = 2**18  # pixels whose running maximum stays in a core's cache
GROUP = (
    2**21
)  # values resized at once: memory of this size is used again, larger memory comes from the system each time


@torch.no_grad()
def segmentation_areas(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    ignore_index: int = 255,
    label_sizes: torch.Tensor | np.ndarray | None = None,
) -> torch.Tensor:
    """Count pixels of each class: correctly predicted, predicted, and labelled.

    These are the diagonal, the column sums and the row sums of the confusion matrix: all that IoU and accuracies need.
    They can be summed exactly over images, batches and processes. An accelerator is not waited for, unless
    `label_sizes` are on it.

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
        ValueError: for a label that is neither a class nor `ignore_index`; of labels on an accelerator,
            `segmentation_scores` raises it.
    """
    sizes = [list(labels.shape[-2:])] * len(labels) if label_sizes is None else label_sizes.tolist()
    rows = []
    for image_logits, image_labels, (height, width) in zip(logits, labels, sizes, strict=True):
        prediction = likeliest(image_logits, (height, width))
        rows.append(prediction_areas(prediction, image_labels[:height, :width], num_labels, ignore_index))
    return torch.stack(rows)


@torch.no_grad()
def likeliest(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits [K, h, w], resized to `size`, by `argmax(0)`: the first of equal ones; uint8 or int16 on the CPU.

    On the CPU, `argmax` walks through the classes of one pixel after another; a running maximum of whole classes takes
    a twentieth of its time, and never holds the resized logits of all of them.
    """
    if not logits.is_cpu or len(logits) > 2**15:
        return _resized(logits, size).argmax(0)
    found, best = torch.zeros(size), torch.full(size, -torch.inf)
    rows = max(1, BLOCK // max(1, size[1]))
    better = torch.empty_like(
        best[:rows]
    )  # 1 or 0: to compare with bools as the result takes more than twice the time
    classes = max(1, GROUP // max(1, best.numel()))
    for first in range(0, len(logits), classes):
        values = _resized(logits[first : first + classes], size)
        for top in range(0, size[0], rows):
            part, height = slice(top, top + rows), min(rows, size[0] - top)
            for label, value in enumerate(values[:, part], first):
                torch.gt(value, best[part], out=better[:height])
                torch.maximum(value, best[part], out=best[part])
                # the labels rise, so the last one that was better is the largest
                torch.maximum(better[:height].mul_(label), found[part], out=found[part])
    if best.isnan().any():  # nothing is greater than NaN, but to argmax NaN is the maximum
        return _resized(logits, size).argmax(0)
    return found.to(torch.uint8 if len(logits) <= 256 else torch.int16)


def _resized(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Logits [K, h, w], resized to `size`, float32."""
    plain = logits.float().contiguous()
    if plain.shape[-2:] == size:
        return plain
    return interpolate(plain[None], size=size, mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def prediction_areas(
    prediction: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_index: int = 255
) -> torch.Tensor:
    """`segmentation_areas` [3, K] of one image, from its predicted classes [H, W] in 0..K-1; K, no class, is never
    right. Raises ValueError, as that does, for a label or a prediction that is none of these, or maps of two sizes."""
    if prediction.shape != labels.shape:
        raise ValueError(f"expected maps of one size, got {tuple(prediction.shape)} and {tuple(labels.shape)}")
    matrix, outside = _matrix(prediction, labels, num_labels, ignore_index)
    areas = torch.stack([matrix.diagonal(), matrix.sum(0)[:-1], matrix.sum(1)])
    return areas if labels.is_cpu else torch.where(outside.any(), WRONG_LABEL, areas)


@torch.no_grad()
def confusion_counts(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_labels: int,
    ignore_index: int = 255,
    label_sizes: torch.Tensor | np.ndarray | None = None,
) -> torch.Tensor:
    """Confusion matrices int64 [B, K, K], labels in rows and predictions in columns; arguments as those of
    `segmentation_areas`. Labels on an accelerator that are no class are left out."""
    sizes = [list(labels.shape[-2:])] * len(labels) if label_sizes is None else label_sizes.tolist()
    found = [
        _matrix(likeliest(one, (height, width)), label[:height, :width], num_labels, ignore_index)[0]
        for one, label, (height, width) in zip(logits, labels, sizes, strict=True)
    ]
    return torch.stack(found)[..., :num_labels]


def _matrix(
    prediction: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The counts [K, K + 1] of each pair of label and prediction, and where a label is none that is known."""
    counted = labels != ignore_index
    outside = counted & ((labels < 0) | (labels >= num_labels))
    if labels.is_cpu:
        if outside.any():
            raise ValueError(f"label {labels[outside][0].item()} is neither in 0..{num_labels - 1} nor {ignore_index}")
        if prediction.numel() and not 0 <= prediction.min() <= prediction.max() <= num_labels:
            raise ValueError(f"expected predictions in 0..{num_labels - 1}, got {prediction.unique()[-8:].tolist()}")
    # Cells of a confusion matrix [labelled, predicted]; row K collects the pixels that do not count.
    bins = num_labels + 1
    cells = labels.to(torch.int64 if bins > 2**15 else torch.int32).masked_fill(~counted | outside, num_labels)
    cells = cells.mul_(bins).add_(prediction).flatten()
    return _count(cells, bins**2).view(bins, bins)[:-1], outside


def _count(values: torch.Tensor, bins: int) -> torch.Tensor:
    """How often each of 0..bins-1 occurs in [N], int64 [bins]; `bincount` would wait for an accelerator."""
    if values.is_cpu:
        return torch.bincount(values, minlength=bins)
    ones = torch.ones((), dtype=torch.int64, device=values.device).expand(len(values))
    return torch.zeros(bins, dtype=torch.int64, device=values.device).scatter_add_(0, values.long(), ones)


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
        ValueError: if the areas are not [..., 3, K] with K names, or of an image with a label that is no class.
    """
    counts = areas.detach().cpu().numpy() if isinstance(areas, torch.Tensor) else np.asarray(areas)
    if counts.ndim < 2 or counts.shape[-2:] != (3, len(id2label)):
        raise ValueError(f"expected areas [..., 3, {len(id2label)}] for {len(id2label)} classes, got {counts.shape}")
    if (counts < 0).any():
        raise ValueError(
            f"a label is neither in 0..{len(id2label) - 1} nor the one that is ignored; correct the masks"
        )
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


def image_ious(areas: np.ndarray) -> np.ndarray:
    """The mean IoU of each image [N], over the classes in its labels or predictions; nan without a label.

    Args:
        areas: [N, 3, K], from `segmentation_areas`.
    """
    hit, predicted, labelled = np.moveaxis(np.asarray(areas), 1, 0).astype(np.float64)
    union = predicted + labelled - hit
    there = union > 0
    ious = np.divide(hit, union, out=np.zeros_like(hit), where=there)
    count = np.where(labelled.sum(1) > 0, there.sum(1), 0)
    return np.divide(ious.sum(1), count, out=np.full(len(ious), np.nan), where=count > 0)


def _mean(values: np.ndarray) -> float:
    """`np.nanmean`, without its warning where all are nan."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
