"""What is fitted on frozen features: a linear classifier, a linear regression, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

PENALTIES = (1e-2, 1e-3, 1e-4)  # of the squared weights; the best on a held-out fifth of the images is taken
ITERATIONS = 60
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted kNN classifier of DINO (Caron et al. 2021, arXiv:2104.14294)


@dataclass
class Linear:
    """A linear map of standardised features."""

    weight: Tensor  # [C, K]
    bias: Tensor  # [K]

    def __call__(self, features: Tensor) -> Tensor:
        """Values `[N, K]` of features `[N, C]`."""
        return features @ self.weight + self.bias

    def on_map(self, feature_map: Tensor) -> Tensor:
        """Values `[K, h, w]` of a map `[C, h, w]`."""
        return torch.einsum("chw,ck->khw", feature_map, self.weight) + self.bias[:, None, None]


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = features.mean(0), features.std(0)
    varies = std > 1e-6 * mean.abs() + 1e-30  # what float32 can tell
    return mean, torch.where(varies, std, torch.inf)


def _folded(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> Linear:
    """The map of features that takes in their standardisation; a constant feature has no weight."""
    scaled = weight / std[:, None]
    return Linear(scaled, bias - mean @ scaled)


def classifier(features: Tensor, labels: Tensor, classes: int, penalty: float) -> Linear:
    """Multinomial logistic regression by L-BFGS.

    Args:
        features: `[N, C]`.
        labels: `[N]`, 0..K-1.
        classes: K.
        penalty: of half the squared weights, beside the mean cross-entropy.
    """
    mean, std = _standard(features)
    inputs = (features - mean) / std
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(inputs @ weight + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return _folded(weight.detach(), bias.detach(), mean, std)


def regression(features: Tensor, values: Tensor, penalty: float) -> Linear:
    """Ridge regression, in closed form.

    Args:
        features: `[N, C]`.
        values: `[N]`.
        penalty: of the squared weights, beside the mean squared error.
    """
    mean, std = _standard(features)
    inputs = ((features - mean) / std).double()
    target = values.double() - values.double().mean()
    gram = inputs.T @ inputs / len(inputs) + penalty * torch.eye(inputs.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, inputs.T @ target / len(inputs)).float()[:, None]
    return _folded(weight, values.mean()[None], mean, std)


def neighbours(known: Tensor, labels: Tensor, asked: Tensor, classes: int) -> Tensor:
    """Votes `[M, K]` of the nearest known features `[N, C]` for asked ones `[M, C]`, weighted as in DINO."""
    centre = known.mean(0)
    known, asked = normalize(known - centre, dim=1), normalize(asked - centre, dim=1)
    similar, index = (asked @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1)
    votes = torch.zeros(len(asked), classes)
    return votes.scatter_add_(1, labels[index], (similar / TEMPERATURE).exp())


def held_out(groups: Tensor, share: int = 5) -> tuple[Tensor, Tensor]:
    """Masks `[N]` of the first four fifths and the last fifth of images, from the image of each feature `[N]`."""
    last = groups >= groups.max() + 1 - max(1, (int(groups.max()) + 1) // share)
    return ~last, last


def chosen(scores: Sequence[float]) -> float:
    """The penalty with the greatest score."""
    return PENALTIES[max(range(len(PENALTIES)), key=lambda index: scores[index])]
