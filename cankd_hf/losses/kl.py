"""KL divergence of the classes' probabilities (Hinton et al.)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.losses.base import LogitsLoss, above_zero
from cankd_hf.losses.kernels.binary import binary_divergence


class KLLoss(LogitsLoss):
    """`T^2 * KL(p(t / T) || p(s / T))`, a mean over images and positions (Hinton et al. 2015, section 2).

    Args:
        num_labels: classes K of both heads.
        temperature: T.
        activation: "softmax", or "sigmoid" for heads whose classes do not exclude each other, as those of most
            detectors (then the sum of K binary divergences): a softmax would lose their absolute scores.

    Shape:
        student and teacher [B, K, H, W], [B, N, K] or [B, K] -> [].
    """

    paper = "1503.02531"
    citation = (
        "@misc{hinton2015distilling, title={Distilling the Knowledge in a Neural Network}, author={Hinton, Geoffrey "
        "and Vinyals, Oriol and Dean, Jeff}, year={2015}, note={arXiv:1503.02531}}"
    )

    def __init__(
        self, num_labels: int, temperature: float = 1.0, activation: Literal["softmax", "sigmoid"] = "softmax"
    ) -> None:
        super().__init__(num_labels)
        above_zero("KLLoss", temperature=temperature)
        if activation not in ("softmax", "sigmoid"):
            raise InputError(f"KLLoss.activation: expected softmax or sigmoid, got {activation!r}; choose one of them")
        if activation == "softmax":
            self.needs_two_classes()
        self.temperature, self.activation = temperature, activation

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss [] of two checked logits."""
        ours, theirs = student / self.temperature, teacher / self.temperature
        if self.activation == "sigmoid":
            divergence = binary_divergence(ours, theirs).sum()
        else:
            dim = self.class_dim(student)
            divergence = F.kl_div(ours.log_softmax(dim), theirs.log_softmax(dim), reduction="sum", log_target=True)
        return divergence * (self.temperature**2 * self.num_labels / student.numel())
