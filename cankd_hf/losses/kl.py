"""KL divergence of the classes' probabilities (Hinton et al.)."""

from typing import Any, Literal

import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.losses.base import LogitsLoss, Seen, above_zero, at_least_zero, one_of
from cankd_hf.losses.kernels.binary import binary_divergence
from cankd_hf.losses.kernels.divergence import divergence, mean_divergence
from cankd_hf.losses.labels import labels_of


class KLLoss(LogitsLoss):
    """`T^2 * KL(p(t / T) || p(s / T))`, a mean over images and positions (Hinton et al. 2015, section 2).

    Every position counts that is not padding, void ones too. With a `threshold` only those of which the teacher is
    sure, with the sum still divided by all of them (as UniMatch V2 divides its loss, 2410.10777).

    Args:
        num_labels: classes K of both heads.
        temperature: T.
        activation: "softmax", or "sigmoid" for heads whose classes do not exclude each other, as those of most
            detectors (then the sum of K binary divergences): a softmax would lose their absolute scores. "auto" is
            that of the student's head.
        threshold: least probability of the teacher's best class, below 1; 0 takes all positions.

    Shape:
        student and teacher [B, K, H, W], [B, N, K] or [B, K] -> []; weights: `Seen` of each position.
    """

    extras = ("weights",)
    of_head = ("activation",)
    paper = "1503.02531"
    citation = (
        "@misc{hinton2015distilling, title={Distilling the Knowledge in a Neural Network}, author={Hinton, Geoffrey "
        "and Vinyals, Oriol and Dean, Jeff}, year={2015}, note={arXiv:1503.02531}}"
    )

    def __init__(
        self,
        num_labels: int,
        temperature: float = 1.0,
        activation: Literal["auto", "softmax", "sigmoid"] = "auto",
        threshold: float = 0.0,
    ) -> None:
        super().__init__(num_labels)
        above_zero("KLLoss", temperature=temperature)
        at_least_zero("KLLoss", threshold=threshold)
        if threshold >= 1:
            raise InputError(f"KLLoss.threshold: expected a probability below 1, got {threshold!r}; 0.95 is usual")
        one_of("KLLoss", "activation", activation, "auto", "softmax", "sigmoid")
        self.temperature, self.activation, self.threshold = temperature, activation, threshold
        if activation != "sigmoid":
            self.needs_two_classes()

    def compute(self, student: Tensor, teacher: Tensor, weights: Seen | None = None) -> Tensor:
        """The loss [] of two checked logits."""
        dim = self.class_dim(student)
        if self.activation != "sigmoid" and weights is None and not self.threshold:
            return self.temperature**2 * mean_divergence(student, teacher, dim, self.temperature)
        if self.activation == "sigmoid":
            each = binary_divergence(student / self.temperature, teacher / self.temperature).sum(dim)
        else:
            each = divergence(student, teacher, dim, self.temperature)
        each = each if not self.threshold else each * self._kept(teacher)
        return self.temperature**2 * (each.mean() if weights is None else weights.mean(each))

    def _kept(self, teacher: Tensor) -> Tensor:
        """Whether the teacher is sure of each position, as the loss's numbers."""
        dim = self.class_dim(teacher)
        p = teacher.sigmoid() if self.activation == "sigmoid" else teacher.softmax(dim)
        return (p.amax(dim) >= self.threshold).to(teacher.dtype)

    @torch.no_grad()
    def report(self, student: Tensor, teacher: Tensor, **extras: Any) -> dict[str, Tensor]:
        """With a threshold: the share of the positions that is `kept`, and what part of these is of each class.

        `prior` is the part of each class in the labels; without labels, in all that the teacher says.
        """
        if not self.threshold:
            return {}
        weights, found = extras.get("weights"), teacher.argmax(self.class_dim(teacher))
        counted = torch.ones_like(found, dtype=torch.float32) if weights is None else weights.seen
        kept = counted * self._kept(teacher.float())
        labels = labels_of(extras.get("labels"), teacher)
        true = found if labels is None else labels
        inside = counted * ((true >= 0) & (true < self.num_labels))
        said, given, all_of = self._shares(found, kept), self._shares(true, inside), kept.sum() / counted.sum()
        classes = range(self.num_labels)
        by_class = {f"{name}/{k}": of[k] for name, of in (("kept", said), ("prior", given)) for k in classes}
        return {"kept": all_of, **by_class}

    def _shares(self, classes: Tensor, weights: Tensor) -> Tensor:
        """The part [K] that each class has of the weights; nan where all are 0."""
        index = classes.clamp(0, self.num_labels - 1).flatten()
        sums = weights.new_zeros(self.num_labels).scatter_add(0, index, weights.flatten())
        return sums / sums.sum()
