"""Classes and boxes of two detectors with queries, matched to one another."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.losses.base import LogitsLoss, Seen, at_least_zero, one_of
from cankd_hf.losses.kernels.binary import binary_divergence
from cankd_hf.losses.kernels.boxes import corners, overlap
from cankd_hf.losses.kernels.divergence import divergence

Predictions = Mapping[str, Tensor]  # "boxes" [B, N, 4]: centre x, centre y, width, height in 0..1
# Costs [B, N, M] -> places [B, n] of the N and of the M that belong together at the least cost, n = min(N, M).
Assign = Callable[[Tensor], tuple[Tensor, Tensor]]
# DETR's factors of the matching cost and of its losses: class, L1 distance and GIoU of the boxes
CLASS, DISTANCE, OVERLAP = 1.0, 5.0, 2.0
ABSENT = -1e4  # a logit whose sigmoid is 0
EMPTY = 0.1  # DETR's weight of a query without an object, for heads with a class "no object"


class QueryLogitsLoss(LogitsLoss):
    """Classes and boxes of a DETR-like detector from another one, query by matched query.

    The student's queries are matched to the teacher's of the highest confidence, image by image, at the least cost
    (Hungarian matching, as DETR matches objects): `-p(s)[class of t] + 5 L1 + 2 (1 - GIoU)`. With w the confidence of
    a teacher's query, its highest probability of a class:

    - classes, sigmoid heads: `sum |p(t) - p(s)|^gamma KL(p(t) || p(s)) / sum w`, binary, over all classes of the
      matched queries; a student's query that found no partner is pushed to 0 in the same way;
    - classes, softmax heads with "no object": `sum v KL(p(t) || p(s)) / sum w`, v = w + 0.1 (1 - w); a query without
      a partner is pushed to "no object" with v = 0.1, DETR's weight;
    - boxes: `sum w (5 L1 + 2 (1 - GIoU)) / sum w` over the matched queries.

    Matched predictions are compared as in DETRDistill (Chang et al. 2023, section 3.2); the weights by confidence are
    ours: they do without labels.

    Args:
        num_labels: classes K of both heads, with "no object" if they have it.
        gamma: exponent of the difference that class logits of sigmoid heads are weighted by.
        boxes: weight of the boxes.
        top: number of the teacher's queries that are matched, those of the highest confidence.
        activation: of the heads: "sigmoid" for each class, or "softmax" with "no object" as the last class; "auto" is
            that of the student.

    Shape:
        student [B, N, K] and teacher [B, M, K] -> []; predictions: of both, with `boxes` [B, N, 4] and [B, M, 4];
        assign: matches them, see `Assign`; weights: `Seen` of each of the teacher's queries, which says nothing of
        padding. Without predictions two logits of one shape are compared position by
        position.
    """

    reads = "queries"
    extras = ("predictions", "assign", "weights")
    of_head = ("activation",)
    paper = "2211.10156"
    citation = (
        "@inproceedings{chang2023detrdistill, title={DETRDistill: A Universal Knowledge Distillation Framework for "
        "DETR-families}, author={Chang, Jiahao and Wang, Shuo and Xu, Hai-Ming and Chen, Zehui and Yang, Chenhongyi "
        "and Zhao, Feng}, booktitle={ICCV}, year={2023}}"
    )

    def __init__(
        self,
        num_labels: int,
        gamma: float = 1.0,
        boxes: float = 1.0,
        top: int = 100,
        activation: Literal["auto", "sigmoid", "softmax"] = "auto",
    ) -> None:
        super().__init__(num_labels)
        at_least_zero("QueryLogitsLoss", gamma=gamma, boxes=boxes)
        if not isinstance(top, int) or top < 1:
            raise InputError(f"QueryLogitsLoss.top: expected at least 1 query, got {top!r}; leave it out for 100")
        one_of("QueryLogitsLoss", "activation", activation, "auto", "sigmoid", "softmax")
        self.gamma, self.boxes, self.top, self.activation = gamma, boxes, top, activation
        if activation == "softmax":
            self.needs_two_classes()

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """As for all losses; but queries of the two may be of different numbers."""
        queries = student.ndim == teacher.ndim == 3 and len(student) == len(teacher)
        if not (queries and student.shape[2] == teacher.shape[2] == self.num_labels and student.numel()):
            super().check(student, teacher)

    def compute(
        self,
        student: Tensor,
        teacher: Tensor,
        predictions: tuple[Predictions, Predictions] | None = None,
        assign: Assign | None = None,
        weights: Seen | None = None,
    ) -> Tensor:
        """The loss [] of two checked logits, and of the boxes of their queries."""
        if predictions is None:
            if student.shape != teacher.shape:
                super().check(student, teacher)
            dim = self.class_dim(student)
            ours, theirs = (x.movedim(dim, -1).reshape(1, -1, self.num_labels) for x in (student, teacher))
            confidence = self._probabilities(theirs).amax(-1)
            return self._classes(ours, theirs, confidence, None)
        ours, theirs = (of["boxes"].to(student.dtype) for of in predictions)
        confidence = self._probabilities(teacher).amax(-1)
        valid = torch.ones_like(confidence) if weights is None else weights.valid.to(confidence.dtype)
        confidence, places = (confidence * valid).topk(min(self.top, teacher.shape[1]), 1)
        teacher, theirs, valid = (
            x.take_along_dim(places if x.ndim == 2 else places[..., None], 1) for x in (teacher, theirs, valid)
        )
        teacher = torch.where(valid[..., None] > 0, teacher, self._empty(teacher))
        if assign is None:
            raise ValueError(
                "QueryLogitsLoss: expected `assign` beside `predictions`, got none; it matches the queries"
            )
        rows, columns = assign(self._cost(student, teacher, ours, theirs) * valid[:, None])
        matched, confidence = (x.take_along_dim(i, 1) for x, i in ((ours, rows[..., None]), (confidence, columns)))
        teacher, theirs = (x.take_along_dim(columns[..., None], 1) for x in (teacher, theirs))
        value = self._classes(student, teacher, confidence, rows)
        if not self.boxes:
            return value
        apart = (matched - theirs).abs().sum(-1)
        each = DISTANCE * apart + OVERLAP * (1 - overlap(corners(matched), corners(theirs)))
        return value + self.boxes * (confidence * each).sum() / confidence.sum().clamp_min(1e-6)

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Those of the classes, without "no object"."""
        return logits.softmax(-1)[..., :-1] if self.activation == "softmax" else logits.sigmoid()

    def _empty(self, like: Tensor) -> Tensor:
        """Logits that say: no object."""
        empty = torch.full_like(like, ABSENT)
        if self.activation == "softmax":
            empty[..., -1] = 0
        return empty

    @torch.no_grad()
    def _cost(self, student: Tensor, teacher: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
        """What it costs to match a student's query to a teacher's [B, N, M]."""
        best = self._probabilities(teacher).argmax(-1)  # [B, M]
        rated = self._probabilities(student).take_along_dim(best[:, None], 2)  # [B, N, M]
        apart = torch.cdist(ours, theirs, p=1)
        shared = overlap(corners(ours)[:, :, None], corners(theirs)[:, None])
        return (DISTANCE * apart - OVERLAP * shared - CLASS * rated).nan_to_num(1e4, 1e4, -1e4)

    def _classes(self, student: Tensor, teacher: Tensor, confidence: Tensor, rows: Tensor | None) -> Tensor:
        """The loss [] of all N queries of the student [B, N, K], of which `rows` [B, n] belong to the teacher's."""
        if rows is not None:
            teacher = self._empty(student).scatter(1, rows[..., None].expand(-1, -1, self.num_labels), teacher)
            confidence = torch.zeros_like(student[..., 0]).scatter(1, rows, confidence)
        if self.activation == "softmax":
            value = ((confidence + EMPTY * (1 - confidence)) * divergence(student, teacher, -1)).sum()
        else:
            weight = (teacher.sigmoid() - student.detach().sigmoid()).abs().pow(self.gamma)
            value = (weight * binary_divergence(student, teacher)).sum()
        result: Tensor = value / confidence.sum().clamp_min(1)
        return result

    @torch.no_grad()
    def report(self, student: Tensor, teacher: Tensor, **extras: Any) -> dict[str, Tensor]:
        """`confidence`: the mean confidence of the teacher's queries that are matched."""
        best = self._probabilities(teacher.float()).amax(-1).flatten(1)
        return {"confidence": best.topk(min(self.top, best.shape[1]), 1)[0].mean()}
