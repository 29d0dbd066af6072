"""KL divergence of the target's probability and of all others', weighted apart (DKD)."""

import torch
from torch import Tensor

from cankd_hf.losses.base import LogitsLoss, Seen, above_zero, at_least_zero
from cankd_hf.losses.labels import labels_of


class DKDLoss(LogitsLoss):
    """Decoupled knowledge distillation (Zhao et al. 2022, equation 7): `T^2 * (alpha * TCKD + beta * NCKD)`.

    TCKD is the divergence of the two numbers p(target) and 1 - p(target), NCKD that of the other classes among
    themselves; both are means over images and positions. The target is the label, as in the paper; where there is
    none (images without labels, void positions), the teacher's most probable class.

    Args:
        num_labels: classes K of both heads.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T; the authors use 4 on CIFAR-100 and 1 on ImageNet.

    Shape:
        student and teacher [B, K, H, W], [B, N, K] or [B, K] -> []; labels [B, h, w] or [B], int64; weights: `Seen`.
    """

    extras = ("labels", "weights")
    needs_softmax = True
    paper = "2203.08679"
    citation = (
        "@inproceedings{zhao2022dkd, title={Decoupled Knowledge Distillation}, author={Zhao, Borui and Cui, Quan and "
        "Song, Renjie and Qiu, Yiyu and Liang, Jiajun}, booktitle={CVPR}, year={2022}}"
    )

    def __init__(self, num_labels: int, alpha: float = 1.0, beta: float = 8.0, temperature: float = 1.0) -> None:
        super().__init__(num_labels)
        self.needs_two_classes()
        above_zero("DKDLoss", temperature=temperature)
        at_least_zero("DKDLoss", alpha=alpha, beta=beta)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def compute(self, student: Tensor, teacher: Tensor, labels: object = None, weights: Seen | None = None) -> Tensor:
        """The loss [] of two checked logits, and the labels of the batch."""
        dim = self.class_dim(student)
        target, given = teacher.argmax(dim), labels_of(labels, student)
        if given is not None:
            target = torch.where((given >= 0) & (given < self.num_labels), given, target)
        index = target.unsqueeze(dim)
        ours, theirs = (self._parts(x / self.temperature, index, dim) for x in (student, teacher))
        target_part, other_part = (
            (theirs[i].exp() * (theirs[i] - ours[i])).sum(dim) for i in (0, 1)
        )  # of the target and the rest, and of the other classes
        each = self.alpha * target_part + self.beta * other_part
        return self.temperature**2 * (each.mean() if weights is None else weights.mean(each))

    def _parts(self, logits: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Logarithms: of p(target) and 1 - p(target), 2 values, and of all classes but the target, K values."""
        others = logits.scatter(dim, index, torch.finfo(logits.dtype).min)
        pair = torch.cat([logits.gather(dim, index), others.logsumexp(dim, keepdim=True)], dim)
        return pair.log_softmax(dim), others.log_softmax(dim)
