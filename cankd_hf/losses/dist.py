"""Correlation of the classes within a sample and of the samples within a class (DIST)."""

import torch
from torch import Tensor

from cankd_hf.losses.base import LogitsLoss, Seen, above_zero, at_least_zero

EPS = 1e-8  # as in the authors' code
CONSTANT = 1e-6  # probabilities whose deviations have a smaller norm are constant up to rounding


class DistLoss(LogitsLoss):
    """Pearson distance of the probabilities, over classes and over samples (DIST, Huang et al. 2022, section 4).

    `T^2 * (beta * (1 - mean r over classes) + gamma * (1 - mean r over samples))`, r of `softmax(s / T)` and
    `softmax(t / T)`. Positions count as samples of the batch, as in the authors' code for segmentation.

    Args:
        num_labels: classes K of both heads.
        beta: weight of the correlation between the classes of a sample.
        gamma: weight of the correlation between the samples of a class.
        temperature: T.

    Shape:
        student and teacher [B, K, H, W], [B, N, K] or [B, K] -> []; weights: `Seen` of each position.
    """

    extras = ("weights",)
    needs_softmax = True
    paper = "2205.10536"
    citation = (
        "@inproceedings{huang2022dist, title={Knowledge Distillation from A Stronger Teacher}, author={Huang, Tao and"
        " You, Shan and Wang, Fei and Qian, Chen and Xu, Chang}, booktitle={NeurIPS}, year={2022}}"
    )

    def __init__(self, num_labels: int, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(num_labels)
        self.needs_two_classes()
        above_zero("DistLoss", temperature=temperature)
        at_least_zero("DistLoss", beta=beta, gamma=gamma)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def compute(self, student: Tensor, teacher: Tensor, weights: Seen | None = None) -> Tensor:
        """The loss [] of two checked logits."""
        classes = self.class_dim(student)
        samples = tuple(dim for dim in range(student.ndim) if dim != classes)
        p, q = ((x / self.temperature).softmax(classes) for x in (student, teacher))
        rows = 1 - pearson(p, q, (classes,))
        between = rows.mean() if weights is None else weights.mean(rows)
        share = None if weights is None else weights.seen.unsqueeze(classes)
        within = 1 - pearson(p, q, samples, share).mean()
        if weights is not None:  # the part of the positions that counts
            within = within * weights.mean(torch.ones_like(weights.seen))
        return self.temperature**2 * (self.beta * between + self.gamma * within)


def pearson(a: Tensor, b: Tensor, dims: tuple[int, ...], weights: Tensor | None = None) -> Tensor:
    """Pearson correlation over some dimensions, weighted; 0, with gradient 0, where `a` is constant."""
    if weights is None:
        a, b = (x - x.mean(dims, keepdim=True) for x in (a, b))
    else:
        total = weights.sum().clamp_min(EPS)
        a, b = (weights.sqrt() * (x - (weights * x).sum(dims, keepdim=True) / total) for x in (a, b))
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=dims) for x in (a, b))
    norms = (norm_a * norm_b + EPS).masked_fill(norm_a < CONSTANT, torch.inf)
    r: Tensor = (a * b).sum(dims) / norms
    return r
