"""Class logits and boxes of two dense detectors, anchor by anchor."""

from collections.abc import Mapping
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from cankd_hf.losses.base import LogitsLoss, Seen, at_least_zero, at_most_one, one_of
from cankd_hf.losses.focal_global import boxes_of
from cankd_hf.losses.kernels.binary import binary_divergence
from cankd_hf.losses.kernels.boxes import corners, covered, overlap

Predictions = Mapping[str, Tensor]  # "boxes" [B, A, 4] and perhaps "quality" [B, A]
ABSENT = -1e4  # a logit whose sigmoid is 0
FOUND = 0.5  # overlap of an object with a box of the region from which on it lies in the region


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

    Anchors that the student does not see (padding, erased) count for nothing.

    Args:
        num_labels: classes K of both heads.
        gamma: exponent of the difference that class logits are weighted by; 0 weighs all alike.
        boxes: weight of the boxes and the centre-ness.
        region: fraction of the anchors whose boxes are compared.
        outside: the target of the classes outside of the region: what the "teacher" says, or "zero" as in Dense
            Teacher, which suppresses objects that the region misses (`recall` in the log).

    Shape:
        student and teacher: class logits [B, A, K] of A anchors (also [B, K, H, W] or [B, K]) -> []; predictions: of
        both, with `boxes` [B, A, 4] (corners in 0..1) and perhaps `quality` [B, A] (logit of the centre-ness).
        Without predictions only classes are compared. weights: `Seen` of each anchor.
    """

    reads = "dense"
    extras = ("predictions", "weights")
    paper = "2308.14286"
    citation = (
        "@inproceedings{yang2023bckd, title={Bridging Cross-task Protocol Inconsistency for Distillation in Dense "
        "Object Detection}, author={Yang, Longrong and Zhou, Xianpan and Li, Xuewei and Qiao, Liang and Li, Zheyang "
        "and Yang, Ziwei and Wang, Gaoang and Li, Xi}, booktitle={ICCV}, year={2023}}"
    )

    def __init__(
        self,
        num_labels: int,
        gamma: float = 1.0,
        boxes: float = 1.0,
        region: float = 0.01,
        outside: Literal["teacher", "zero"] = "teacher",
    ) -> None:
        super().__init__(num_labels)
        name = type(self).__name__
        at_least_zero(name, gamma=gamma, boxes=boxes)
        at_most_one(name, region=region)
        one_of(name, "outside", outside, "teacher", "zero")
        self.gamma, self.boxes, self.region, self.outside = gamma, boxes, region, outside

    def compute(
        self,
        student: Tensor,
        teacher: Tensor,
        predictions: tuple[Predictions, Predictions] | None = None,
        weights: Seen | None = None,
    ) -> Tensor:
        """The loss [] of two checked class logits, and of the other predictions at their anchors."""
        dim = self.class_dim(teacher)
        best = teacher.sigmoid().amax(dim)
        counted = best if weights is None else best * weights.seen
        if self.outside == "zero":
            chosen = self._chosen(counted.flatten(1), predictions)[1]
            inside = torch.zeros_like(best, dtype=torch.bool).flatten(1).scatter(1, chosen, True).view_as(best)
            teacher = torch.where(inside.unsqueeze(dim), teacher, ABSENT)
        p = teacher.sigmoid()
        weight = (p - student.detach().sigmoid()).abs().pow(self.gamma)
        each = weight * binary_divergence(student, teacher)
        if weights is not None:
            each = each * weights.seen.unsqueeze(dim)
        value = each.sum() / counted.sum().clamp_min(1)
        if predictions is None or not self.boxes:
            return value
        return value + self.boxes * self._located(counted, *predictions)

    def _chosen(self, best: Tensor, predictions: tuple[Predictions, Predictions] | None) -> tuple[Tensor, Tensor]:
        """The teacher's quality [B, n] of the n anchors of the region, and their places [B, n]."""
        theirs: Predictions = {} if predictions is None else predictions[1]
        rank = best * theirs["quality"].sigmoid() if "quality" in theirs else best
        values, places = rank.topk(ceil(self.region * rank.shape[1]), dim=1)
        return values, places

    def _located(self, best: Tensor, ours: Predictions, theirs: Predictions) -> Tensor:
        """The loss [] of boxes and centre-ness; `best` [B, A] is the teacher's highest probability of each anchor."""
        weight, index = self._chosen(best, (ours, theirs))

        def chosen(of: Predictions, name: str) -> Tensor:
            x = of[name].to(weight.dtype)
            return x.take_along_dim(index if x.ndim == 2 else index[..., None], 1)

        value = 1 - overlap(chosen(ours, "boxes"), chosen(theirs, "boxes"))
        if "quality" in ours and "quality" in theirs:
            value = value + binary_divergence(chosen(ours, "quality"), chosen(theirs, "quality"))
        mean: Tensor = (weight * value).sum() / weight.sum().clamp_min(1e-6)
        return mean

    @torch.no_grad()
    def report(self, student: Tensor, teacher: Tensor, **extras: Any) -> dict[str, Tensor]:
        """`recall`: the part of the labelled objects that a box of the teacher in the region overlaps by half."""
        predictions, labels = extras.get("predictions"), extras.get("labels")
        if predictions is None:
            return {}
        recall = teacher.new_full((), torch.nan, dtype=torch.float32)
        places = self._chosen(teacher.float().sigmoid().amax(-1), predictions)[1]
        boxes = predictions[1]["boxes"].float().take_along_dim(places[..., None], 1)
        pairs = zip(boxes_of(labels) or [], boxes, strict=False)
        given = [(of, one) for of, one in pairs if of is not None and len(of)]
        found = [covered(corners(of)[:, None], one).amax(1) >= FOUND for of, one in given]
        return {"recall": torch.cat(found).float().mean() if found else recall}
