"""Matched boxes from the tables of `detection_statistics`: a score of each image, and what is taken for what."""

from typing import NamedTuple

import numpy as np

from cankd_hf.metrics.detection import CROWD, DETECTION, OBJECT, PADDING

IOU = 0.5
USUAL = 0.3  # threshold where nothing is found, so that none is better than another


class Matched(NamedTuple):
    """Detections of a set matched with its objects.

    Attributes:
        threshold: least score of a detection that counts: that with the best F1 of the whole set.
        f1: [N], of each image, 1 where nothing is there and nothing is found; nan for an image that does not count.
        confusion: int64 [K + 1, K + 1], classes of objects in rows, of detections in columns; the last of each is
            nothing, the background.
    """

    threshold: float
    f1: np.ndarray
    confusion: np.ndarray


class _Image(NamedTuple):
    """One image: its detections, best first, and objects, and which of them match in one class."""

    classes: np.ndarray  # of the detections
    scores: np.ndarray
    objects: np.ndarray  # classes of the objects
    overlap: np.ndarray  # [detections, objects], IoU
    partner: np.ndarray  # of each detection: its object, -1 for none, -2 for one on a crowd, which does not count
    counts: bool  # whether there is anything in its table


def match_boxes(statistics: np.ndarray, num_labels: int) -> Matched:
    """Matches the detections of each image, best first, with objects of their class that they overlap by an IoU of
    0.5 or more, as COCO does; a detection on a crowd of its class counts for nothing.

    What is left over of both above the threshold is matched regardless of the class, for the confusion matrix.

    Args:
        statistics: [N, R, 7], of `detection_statistics`.
        num_labels: K.
    """
    images = [_matched(table[table[:, 0] != PADDING]) for table in np.asarray(statistics, dtype=np.float64)]
    threshold = _best_threshold(images)
    confusion, f1 = np.zeros((num_labels + 1, num_labels + 1), dtype=np.int64), np.full(len(images), np.nan)
    for number, image in enumerate(images):
        if not image.counts:
            continue
        count = (image.scores >= threshold) & (image.partner > -2)
        right = int((count & (image.partner >= 0)).sum())
        together = int(count.sum()) + len(image.objects)
        f1[number] = 2 * right / together if together else 1.0
        _count_pairs(image, count, confusion)
    return Matched(threshold, f1, confusion)


def _matched(rows: np.ndarray) -> _Image:
    found, there, crowds = (rows[rows[:, 0] == kind] for kind in (DETECTION, OBJECT, CROWD))
    found = found[np.argsort(-found[:, 2], kind="stable")]
    overlap = _overlap(found[:, 3:], there[:, 3:])
    partner, taken = np.full(len(found), -1), np.zeros(len(there), dtype=bool)
    possible = (overlap >= IOU) & (found[:, 1][:, None] == there[:, 1])
    for index in np.flatnonzero(possible.any(1)):
        free = np.where(possible[index] & ~taken, overlap[index], 0.0)
        best = int(free.argmax())
        if free[best] > 0:
            partner[index], taken[best] = best, True
    if len(crowds):
        inside = (_overlap(found[:, 3:], crowds[:, 3:], of_first=True) >= IOU) & (found[:, 1][:, None] == crowds[:, 1])
        partner[(partner < 0) & inside.any(1)] = -2
    return _Image(found[:, 1].astype(int), found[:, 2], there[:, 1].astype(int), overlap, partner, len(rows) > 0)


def _overlap(first: np.ndarray, second: np.ndarray, of_first: bool = False) -> np.ndarray:
    """IoU of boxes [n, 4] with boxes [m, 4], [n, m]; `of_first`: the part of the first that is in the second."""
    low, high = np.maximum(first[:, None, :2], second[:, :2]), np.minimum(first[:, None, 2:], second[:, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    own, other = (np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(1) for boxes in (first, second))
    whole = own[:, None] if of_first else own[:, None] + other - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def _best_threshold(images: list[_Image]) -> float:
    """The score from which on detections have the best F1 over all images."""
    scores = np.concatenate([image.scores[image.partner > -2] for image in images] or [np.zeros(0)])
    right = np.concatenate([image.partner[image.partner > -2] >= 0 for image in images] or [np.zeros(0, dtype=bool)])
    if not right.any():
        return USUAL
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of equal scores all count or none
    objects = sum(len(image.objects) for image in images)
    f1 = 2 * right.cumsum() / (np.arange(1, len(right) + 1) + objects)
    return float(scores[np.where(last, f1, -1.0).argmax()])


def _count_pairs(image: _Image, count: np.ndarray, confusion: np.ndarray) -> None:
    """Adds the pairs of an image to the confusion matrix."""
    free = np.ones(len(image.objects), dtype=bool)
    for index in np.flatnonzero(count & (image.partner >= 0)):
        free[image.partner[index]] = False
        confusion[image.classes[index], image.classes[index]] += 1
    for index in np.flatnonzero(count & (image.partner == -1)):
        overlap = np.where(free, image.overlap[index], 0.0)
        best = int(overlap.argmax()) if len(overlap) else -1
        label = len(confusion) - 1
        if best >= 0 and overlap[best] >= IOU:
            free[best], label = False, image.objects[best]
        confusion[label, image.classes[index]] += 1
    confusion[:, -1] += np.bincount(image.objects[free], minlength=len(confusion))
