"""Divergence of independent classes, from their logits."""

import torch.nn.functional as F
from torch import Tensor


def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """`KL(sigmoid(t) || sigmoid(s))` of each pair of logits, in their shape."""
    p = teacher.sigmoid()
    yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return p * yes + (1 - p) * no
