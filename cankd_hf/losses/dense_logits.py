"""Class logits and boxes of two dense detectors, anchor by anchor."""

from collections.abc import Mapping
from math import ceil

from torch import Tensor

from cankd_hf.losses.base import LogitsLoss, at_least_zero, at_most_one
from cankd_hf.losses.kernels.binary import binary_divergence
from cankd_hf.losses.kernels.boxes import overlap

Predictions = Mapping[str, Tensor]  # "boxes" [B, A, 4] and perhaps "quality" [B, A]


class DenseLogitsLoss(LogitsLoss):
    """Classes and boxes of a dense detector from another one with the same anchors, both weighted by quality.

    With p the sigmoid of the K class logits of an anchor and q = max p(t) * centre-ness(t) the teacher's quality
    there:

    - classes: `sum |p(t) - p(s)|^gamma KL(p(t) || p(s)) / sum max p(t)`, binary, over all anchors (Yang et al. 2023,
      BCKD, section 3.2, with the KL divergence in the place of the cross-entropy: it is 0 for equal heads; the weight
      has no gradient);
    - boxes: `sum q (1 - GIoU(box(s), box(t))) / sum q` over the anchors of the highest q (there, section 3.3; the
      region is that of Zhou et al. 2022, Dense Teacher), and in the same way the divergence of the centre-ness where
      both heads predict it.

    Args:
        num_labels: classes K of both heads.
        gamma: exponent of the difference that class logits are weighted by; 0 weighs all alike.
        boxes: weight of the boxes and the centre-ness.
        region: fraction of the anchors whose boxes are compared.

    Shape:
        student and teacher: class logits [B, A, K] of A anchors (also [B, K, H, W] or [B, K]) -> []; predictions: of
        both, with `boxes` [B, A, 4] (corners in 0..1) and perhaps `quality` [B, A] (logit of the centre-ness).
        Without predictions only classes are compared.
    """

    reads = "dense"
    extras = ("predictions",)
    paper = "2308.14286"
    citation = (
        "@inproceedings{yang2023bckd, title={Bridging Cross-task Protocol Inconsistency for Distillation in Dense "
        "Object Detection}, author={Yang, Longrong and Zhou, Xianpan and Li, Xuewei and Qiao, Liang and Li, Zheyang "
        "and Yang, Ziwei and Wang, Gaoang and Li, Xi}, booktitle={ICCV}, year={2023}}"
    )

    def __init__(self, num_labels: int, gamma: float = 1.0, boxes: float = 1.0, region: float = 0.01) -> None:
        super().__init__(num_labels)
        at_least_zero("DenseLogitsLoss", gamma=gamma, boxes=boxes)
        at_most_one("DenseLogitsLoss", region=region)
        self.gamma, self.boxes, self.region = gamma, boxes, region

    def compute(
        self, student: Tensor, teacher: Tensor, predictions: tuple[Predictions, Predictions] | None = None
    ) -> Tensor:
        """The loss [] of two checked class logits, and of the other predictions at their anchors."""
        p = teacher.sigmoid()
        weight = (p - student.detach().sigmoid()).abs().pow(self.gamma)
        best = p.amax(self.class_dim(teacher))
        value = (weight * binary_divergence(student, teacher)).sum() / best.sum().clamp_min(1)
        if predictions is None or not self.boxes:
            return value
        return value + self.boxes * self._located(best, *predictions)

    def _located(self, best: Tensor, ours: Predictions, theirs: Predictions) -> Tensor:
        """The loss [] of boxes and centre-ness; `best` [B, A] is the teacher's highest probability of each anchor."""
        both = "quality" in ours and "quality" in theirs
        rank = best * theirs["quality"].sigmoid() if "quality" in theirs else best
        weight, index = rank.topk(ceil(self.region * rank.shape[1]), dim=1)

        def chosen(of: Predictions, name: str) -> Tensor:
            x = of[name].to(weight.dtype)
            return x.take_along_dim(index if x.ndim == 2 else index[..., None], 1)

        value = 1 - overlap(chosen(ours, "boxes"), chosen(theirs, "boxes"))
        if both:
            value = value + binary_divergence(chosen(ours, "quality"), chosen(theirs, "quality"))
        mean: Tensor = (weight * value).sum() / weight.sum().clamp_min(1e-6)
        return mean
