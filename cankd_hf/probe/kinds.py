"""What is probed, by the kind of the labels: masks, depth maps, classes of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.metrics.depth import depth_scores, depth_sums
from cankd_hf.metrics.segmentation import segmentation_areas, segmentation_scores
from cankd_hf.probe.features import at_cells
from cankd_hf.probe.fit import PENALTIES, Linear, chosen, classifier, held_out, neighbours, regression

MOST = 2**27  # values of features that are kept to fit on (512 MB); of more, random cells are taken


class Probe(ABC):
    """One probe of a frozen model: fitted on features of the training images, scored image by image.

    Attributes:
        title: of its score.
        lower_is_better: whether a smaller score is better.
    """

    title: str
    lower_is_better = False

    def __init__(self, classes: int, ignore_index: int) -> None:
        self.classes, self.ignore = classes, ignore_index

    @abstractmethod
    def features(self, feature_map: Tensor, label: Any, most: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features `[n, C]` of a map `[C, h, w]` and their labels `[n]`, at most so many."""

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, images: Tensor) -> None:
        """Fits it, given the image of each feature `[N]`."""

    @abstractmethod
    def statistics(self, feature_map: Tensor, label: Any) -> np.ndarray:
        """What an image adds to the sums from which the score follows."""

    @abstractmethod
    def score(self, sums: np.ndarray) -> float:
        """The score of summed statistics."""


class _OfCells(Probe):
    """A linear map of each cell."""

    linear: Linear

    def known(self, labels: Tensor) -> Tensor:
        """Which labels of cells count."""
        raise NotImplementedError

    def features(self, feature_map: Tensor, label: Any, most: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        of_cells = at_cells(torch.as_tensor(label), feature_map.shape[-2:]).flatten()
        index = self.known(of_cells).nonzero()[:, 0]
        index = index[torch.randperm(len(index), generator=draw)[:most]]
        return feature_map.flatten(1).T[index], of_cells[index]


class LinearSegmentation(_OfCells):
    """A linear classifier of cells, its logits resized to each mask; mIoU over all pixels."""

    title = "linear segmentation, mIoU"

    def known(self, labels: Tensor) -> Tensor:
        return (labels != self.ignore) & (labels >= 0) & (labels < self.classes)

    def fit(self, features: Tensor, labels: Tensor, images: Tensor) -> None:
        self.linear = _best_classifier(features, labels, images, self.classes)

    def statistics(self, feature_map: Tensor, label: Any) -> np.ndarray:
        areas = segmentation_areas(
            self.linear.on_map(feature_map)[None], torch.as_tensor(label)[None].long(), self.classes, self.ignore
        )
        return areas[0].numpy()

    def score(self, sums: np.ndarray) -> float:
        return segmentation_scores(sums, {index: str(index) for index in range(self.classes)})["miou"]


class LinearDepth(_OfCells):
    """Ridge regression of the logarithm of each cell's depth, resized to each depth map; AbsRel over all pixels."""

    title = "linear depth, AbsRel"
    lower_is_better = True

    def known(self, labels: Tensor) -> Tensor:
        return (labels > 0) & labels.isfinite()

    def fit(self, features: Tensor, labels: Tensor, images: Tensor) -> None:
        first, last = held_out(images)
        logs, scores = labels.float().log(), []
        for penalty in PENALTIES:
            tried = regression(features[first], logs[first], penalty)
            found = tried(features[last])[:, 0].exp()
            scores.append(-float(((found - labels[last]).abs() / labels[last]).mean()))
        self.linear = regression(features, logs, chosen(scores))

    def statistics(self, feature_map: Tensor, label: Any) -> np.ndarray:
        metres = self.linear.on_map(feature_map)[0].exp()
        return depth_sums(metres[None], torch.as_tensor(label)[None])[0].numpy()

    def score(self, sums: np.ndarray) -> float:
        return depth_scores(sums)["abs_rel"]


class KnnClassification(Probe):
    """The weighted kNN classifier of DINO on the mean of a map; accuracy."""

    title = "kNN classification, accuracy"

    def features(self, feature_map: Tensor, label: Any, most: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return feature_map.mean((1, 2))[None], torch.as_tensor(label).reshape(1).long()

    def fit(self, features: Tensor, labels: Tensor, images: Tensor) -> None:
        self.bank = features, labels

    def votes(self, features: Tensor) -> Tensor:
        """Scores `[1, K]` of features `[1, C]`."""
        return neighbours(*self.bank, features, self.classes)

    def statistics(self, feature_map: Tensor, label: Any) -> np.ndarray:
        return np.array([float(self.votes(feature_map.mean((1, 2))[None]).argmax()) == int(label), 1.0])

    def score(self, sums: np.ndarray) -> float:
        return float(sums[0] / sums[1])


class LinearClassification(KnnClassification):
    """A linear classifier of the mean of a map; accuracy."""

    title = "linear classification, accuracy"

    def fit(self, features: Tensor, labels: Tensor, images: Tensor) -> None:
        self.linear = _best_classifier(features, labels, images, self.classes)

    def votes(self, features: Tensor) -> Tensor:
        return self.linear(features)


def _best_classifier(features: Tensor, labels: Tensor, images: Tensor, classes: int) -> Linear:
    """Fitted on all, with the penalty that does best on a held-out fifth of the images."""
    first, last = held_out(images)
    scores = []
    for penalty in PENALTIES:
        tried = classifier(features[first], labels[first], classes, penalty)
        scores.append(float((tried(features[last]).argmax(1) == labels[last]).float().mean()))
    return classifier(features, labels, classes, chosen(scores))


def probes_for(label: Any, classes: int, ignore_index: int) -> list[Probe]:
    """The probes of a set, by one of its labels. Raises InputError for labels that no probe reads."""
    if isinstance(label, dict) or (isinstance(label, Tensor | np.ndarray) and label.ndim not in (0, 2)):
        raise InputError("--task: expected masks, depth maps or classes of images, got boxes, which no probe reads")
    value = torch.as_tensor(label)
    if value.ndim == 0:
        return [KnnClassification(classes, ignore_index), LinearClassification(classes, ignore_index)]
    if value.is_floating_point():
        return [LinearDepth(classes, ignore_index)]
    return [LinearSegmentation(classes, ignore_index)]
