"""A k-nearest-neighbour probe: how well a student's features tell labels apart, without training anything."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 5
MOST = 4096  # features of each side, of which all pairs are compared


def cells(feature_map: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, C] and labels [N] of a batch of maps [B, C, h, w].

    An image with one label [B] is one feature, its mean; of masks [B, H, W] each cell is one, with the label at its
    centre.
    """
    features = feature_map.float()
    if labels.ndim == 1:
        return features.mean((2, 3)), labels
    size = (features.shape[-2], features.shape[-1])
    of_cells = F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
    return features.flatten(2).transpose(1, 2).flatten(0, 1), of_cells.flatten()


def knn_accuracy(known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], ignore: Sequence[int] = ()) -> float:
    """Share of the asked features whose label most of their nearest known ones (by cosine) have; nan without any.

    Args:
        known: features [N, C] and labels [N].
        asked: features [M, C] and labels [M], of other images.
        ignore: labels that are left out.
    """
    (keys, classes), (queries, truth) = (_kept(*pair, ignore) for pair in (known, asked))
    if not len(classes) or not len(truth):
        return float("nan")
    centre = keys.mean(0)
    keys, queries = (F.normalize(x - centre, dim=1) for x in (keys, queries))
    near = classes[(queries @ keys.T).topk(min(NEIGHBOURS, len(classes)), dim=1).indices]
    return float((near.mode(dim=1).values == truth).float().mean())


def _kept(features: Tensor, labels: Tensor, ignore: Sequence[int]) -> tuple[Tensor, Tensor]:
    kept = ~torch.isin(labels, torch.tensor([*ignore], device=labels.device))
    features, labels = features[kept], labels[kept]
    every = -(-len(labels) // MOST) or 1
    return features[::every], labels[::every]
