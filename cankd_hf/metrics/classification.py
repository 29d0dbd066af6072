"""Scores of classified images from a row of each: exact for any number of processes."""

import numpy as np
import torch
from torch import Tensor

from cankd_hf.metrics.names import class_keys

LABEL, PREDICTED, BEFORE, PROBABILITY = range(4)  # columns of a row
FEW = 5  # of top-5


@torch.no_grad()
def class_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """What the scores need of each image.

    Args:
        logits: [B, K].
        labels: [B], 0..K-1; negative for an image without a class, which does not count.

    Returns:
        float64 [B, 4] (float32 where the device has none): the label, the predicted class, how many classes are before
        the label in the order of their logits (of equal ones the first by number), and the label's probability.
    """
    logits = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    place = labels.clamp(0, logits.shape[1] - 1)[:, None]
    own = logits.gather(1, place)
    numbers = torch.arange(logits.shape[1], device=logits.device)
    before = ((logits > own) | ((logits == own) & (numbers < place))).sum(1)
    found = [labels, logits.argmax(1), before, logits.softmax(1).gather(1, place)[:, 0]]
    return torch.stack([one.to(logits.dtype) for one in found], 1)


def class_scores(rows: Tensor | np.ndarray, id2label: dict[int, str]) -> dict[str, float]:
    """Scores of a whole set.

    Args:
        rows: [N, 4], from `class_rows`.
        id2label: names of the K classes.

    Returns:
        `accuracy` (top-1) and `top5_accuracy` over all images with a class, `mean_accuracy`: the mean over the classes
        that occur, and `accuracy_NAME` of each class (see `class_keys`), nan for one that does not occur.
    """
    table = _known(rows)
    hit = table[:, BEFORE] < 1
    labels = table[:, LABEL].astype(np.int64)
    found = np.bincount(labels, minlength=len(id2label))
    right = np.bincount(labels[hit], minlength=len(id2label))
    each = np.divide(right, found, out=np.full(len(found), np.nan), where=found > 0)
    scores = {
        "accuracy": _share(hit),
        "top5_accuracy": _share(table[:, BEFORE] < FEW),
        "mean_accuracy": float(each[found > 0].mean()) if len(table) else float("nan"),
    }
    return scores | {key: float(each[index]) for index, key in class_keys("accuracy", id2label, scores).items()}


def confusion_of(rows: np.ndarray, classes: int) -> np.ndarray:
    """int64 [K, K]: the truth in rows, predictions in columns."""
    table = _known(rows).astype(np.int64)
    cells = table[:, LABEL] * classes + table[:, PREDICTED]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def probabilities(rows: np.ndarray) -> np.ndarray:
    """The probability of each image's own class, [N]; nan for one without a class."""
    table = np.asarray(rows, dtype=np.float64)
    return np.where(table[:, LABEL] >= 0, table[:, PROBABILITY], np.nan)


def _known(rows: Tensor | np.ndarray) -> np.ndarray:
    table = np.asarray(rows.detach().cpu() if isinstance(rows, Tensor) else rows, dtype=np.float64)
    return table[table[:, LABEL] >= 0]


def _share(hit: np.ndarray) -> float:
    return float(hit.mean()) if len(hit) else float("nan")
