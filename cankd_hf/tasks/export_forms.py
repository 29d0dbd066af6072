"""The exportable forms of students: a module with plain inputs and outputs, and its comparison with the file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchvision.ops import box_convert
from transformers import PreTrainedModel

from cankd_hf.features.similarity import linear_cka

# Largest difference in float32: absolute, plus relative to the output's largest value, since sums in another order
# differ by some units in the sixth digit.
TOLERANCE, RELATIVE = 1e-4, 1e-5
# In half precision: relative to the output's largest absolute value; of detections, the share that must agree.
LOOSE, LOOSE_SHARE = 0.05, 0.9
LOOSE_SCORE, LOOSE_BOX, LOOSE_MASK = 0.05, 0.02, 0.05


@dataclass
class Compared:
    """The result of comparing student and file on one batch."""

    shape: list[int]  # of `pixel_values`
    difference: float  # the largest absolute one over all outputs (of detections found in both)
    allowed: float
    detections: int | None = None  # in the reference, for our own detectors
    missing: int = 0  # detections that only one of the two has
    error: str | None = None  # why the file does not run
    passed: bool = True


@dataclass
class Agreement:
    """How far the outputs of a form are from those of the student in PyTorch, summed over images."""

    largest: float = 0.0  # absolute difference
    total: float = 0.0  # of the absolute differences
    values: int = 0  # that were compared
    equal: float = 0.0  # of `parts`
    parts: int = 0  # pixels, detections, queries or maps, see `ExportForm.equal_name`

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            max(self.largest, other.largest),
            self.total + other.total,
            self.values + other.values,
            self.equal + other.equal,
            self.parts + other.parts,
        )

    @classmethod
    def of(cls, wanted: Tensor, got: Tensor, equal: float, parts: int) -> "Agreement":
        """Of two tensors of one shape."""
        apart = (wanted.double() - got.double()).abs()
        return cls(float(apart.amax()) if apart.numel() else 0.0, float(apart.sum()), apart.numel(), equal, parts)


class PlainOutputs(nn.Module):
    """A model of `transformers` that takes `pixel_values` [B, 3, H, W] and returns a tuple of tensors."""

    def __init__(self, model: PreTrainedModel, read: Callable[[Any], Sequence[Tensor]]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.read(self.model(pixel_values=pixel_values)))


class ExportForm:
    """The exportable form of a student whose outputs are tensors, compared value by value.

    Args:
        model: the student.
        outputs: name of each output -> its convention, for the file's metadata.
        read: takes the outputs from the output of the student's forward; default: its fields of these names.
        module: what to export; default: the student's own forward.
        imports: packages that must be imported before a `torch.export` program is loaded.
    """

    compares_values: ClassVar[bool] = True
    """Whether the tolerance may be raised to the student's own rounding error in float32."""
    equal_name: ClassVar[str] = "similarity"
    """What `Agreement.equal` over `Agreement.parts` is called."""

    def __init__(
        self,
        model: PreTrainedModel,
        outputs: Mapping[str, str],
        read: Callable[[Any], Sequence[Tensor]] | None = None,
        module: nn.Module | None = None,
        imports: tuple[str, ...] = (),
    ) -> None:
        self.outputs, self.imports = dict(outputs), imports
        self.read = read or (lambda output: [output[name] for name in self.outputs])
        self.module = module or PlainOutputs(model, self.read)

    def as_output(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The outputs of a file as those of the student, by name, for the task's scores."""
        return dict(zip(self.outputs, outputs, strict=True))

    def agreement(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
        """How far the outputs of one batch are from the student's: with the CKA of maps and the cosine of others."""
        alike = [
            float((linear_cka(a, b) if a.dim() == 4 else cosine_similarity(a.flatten(1), b.flatten(1))).sum())
            for a, b in zip(wanted, got, strict=True)
        ]
        pairs = zip(wanted, got, alike, strict=True)
        return sum((Agreement.of(a, b, cka, len(a)) for a, b, cka in pairs), Agreement())

    def expected(self, model: Any, images: Tensor) -> list[Tensor]:
        """The outputs of the student's own forward."""
        with torch.no_grad():
            return list(self.read(model(pixel_values=images)))

    def compare(self, wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
        """Compares the outputs of student and file; returns the one nearest to, or furthest over, its limit.

        `shape`: of `pixel_values`; `exact`: whether the file is in float32.
        """
        results = []
        for a, b in zip(wanted, got, strict=True):
            largest = float(a.abs().max())
            allowed = TOLERANCE + RELATIVE * largest if exact else LOOSE * largest
            if a.shape != b.shape:
                reason = f"shape {list(b.shape)} instead of {list(a.shape)}"
                return Compared(shape, float("inf"), allowed, error=reason, passed=False)
            difference = float((a.float() - b.float()).abs().max())
            results.append(Compared(shape, difference, allowed, passed=difference <= allowed))
        return max(results, key=lambda result: result.difference / max(result.allowed, 1e-12))


class PixelsForm(ExportForm):
    """One tensor of logits [B, K, h, w]."""

    equal_name = "equal pixels"

    def agreement(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
        """With the pixels whose best class is the same, on the grid of the logits."""
        same = wanted[0].argmax(1) == got[0].argmax(1)
        return Agreement.of(wanted[0], got[0], float(same.sum()), same.numel())


class QueriesForm(ExportForm):
    """One row per query of a DETR-like detector, in any order."""

    equal_name = "equal queries"

    def agreement(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
        """With the queries of the same best class and nearly the same box."""
        (logits, boxes), (others, their_boxes) = wanted, in_order(list(wanted), list(got))
        near = (boxes - their_boxes).abs().amax(-1) <= LOOSE_BOX
        same = near & (logits.argmax(-1) == others.argmax(-1))
        return Agreement.of(logits, others, float(same.sum()), same.numel())

    def compare(self, wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
        """Compares in the file's order; if that fails, in the student's."""
        result = super().compare(wanted, got, shape, exact)
        if result.passed or result.error is not None:
            return result
        return super().compare(wanted, in_order(wanted, got), shape, exact)


class DetectionsForm(ExportForm):
    """Sets of detections (scores, labels, boxes), matched one to one."""

    compares_values = False

    equal_name = "equal boxes"

    def as_output(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Logits [B, N, K] that are -inf but for the class of each detection, and boxes by their centres."""
        scores, labels, boxes = outputs
        logits = scores.new_full((*scores.shape, int(labels.max().clamp(min=0)) + 1), -torch.inf)
        logits.scatter_(2, labels.clamp(min=0).unsqueeze(2), torch.logit(scores).unsqueeze(2))
        return {"logits": logits, "pred_boxes": box_convert(boxes, "xyxy", "cxcywh")}

    def agreement(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
        """Of the scores; equal is a detection that the other has too: class, and nearly the score and the box."""
        found = Agreement()
        for ours, theirs in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
            rows = _matched(ours, theirs, LOOSE_SCORE, LOOSE_BOX)
            pairs = [(row, other) for row, other, apart in rows if other is not None and apart <= 1]
            count = int((ours[0] > 0).sum()) + int((theirs[0] > 0).sum())
            a, b = (list(side) for side in zip(*pairs, strict=True)) if pairs else ([], [])
            found += Agreement.of(ours[0][a], theirs[0][b], 2.0 * len(pairs), count)
        return found

    def compare(self, wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
        """Compares detections in any order; each is matched once."""
        near_score, near_box = (TOLERANCE, TOLERANCE) if exact else (LOOSE_SCORE, LOOSE_BOX)
        total = missing = 0
        worst = 0.0
        for ours, theirs in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
            matched = 0
            for _, other, apart in _matched(ours, theirs, near_score, near_box):
                total += 1
                if other is None or apart > 1:
                    missing += 1
                    continue
                matched += 1
                worst = max(worst, apart * near_score)
            missing += int((theirs[0] > 0).sum()) - matched
        passed = missing == 0 if exact else missing <= 2 * (1 - LOOSE_SHARE) * total
        return Compared(shape, worst, near_score, total, missing, passed=passed)


class InstancesForm(DetectionsForm):
    """Detections with masks (scores, labels, boxes, mask logits), compared as detections, and then by the masks of
    those that both have."""

    def as_output(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """With the masks as the student has them."""
        return {**super().as_output(outputs[:3]), "pred_masks": outputs[3]}

    def agreement(self, wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Agreement:
        """That of the detections."""
        return super().agreement(wanted[:3], got[:3])

    def compare(self, wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
        """As for detections; the probabilities of masks may differ by `LOOSE_MASK`, on the mean if not `exact`."""
        result = super().compare(wanted[:3], got[:3], shape, exact)
        apart = [0.0]
        for ours, theirs in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
            for row, other, near in _matched(ours[:3], theirs[:3], LOOSE_SCORE, LOOSE_BOX):
                if other is not None and near <= 1:
                    difference = (ours[3][row].sigmoid() - theirs[3][other].sigmoid()).abs()
                    apart.append(float(difference.amax() if exact else difference.mean()))
        if result.passed and max(apart) > LOOSE_MASK:
            return Compared(shape, max(apart), LOOSE_MASK, result.detections, result.missing, passed=False)
        return result


def _matched(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], near_score: float, near_box: float
) -> Iterator[tuple[int, int | None, float]]:
    """For each detection of one image the nearest one of its class that the other has left, and how far it is.

    Each side is scores [N], labels [N] and boxes [N, 4]; a distance of at most 1 is a match.
    """
    (a_scores, a_labels, a_boxes), (b_scores, b_labels, b_boxes) = ours, theirs
    left = set(torch.where(b_scores > 0)[0].tolist())
    for row in torch.where(a_scores > 0)[0].tolist():
        apart = torch.maximum(
            (b_scores - a_scores[row]).abs() / near_score, (b_boxes - a_boxes[row]).abs().amax(dim=1) / near_box
        )
        same = [other for other in left if b_labels[other] == a_labels[row]]
        nearest = min(same, key=lambda i: float(apart[i]), default=None)
        if nearest is not None and apart[nearest] <= 1:
            left.remove(nearest)
        yield row, nearest, float("inf") if nearest is None else float(apart[nearest])


def in_order(wanted: list[Tensor], got: list[Tensor]) -> list[Tensor]:
    """The file's outputs [B, N, *] with the queries in the student's order, as those of equal rank may be swapped."""
    ours, theirs = (torch.cat([x.flatten(2).float() for x in outputs], dim=2) for outputs in (wanted, got))
    places = [torch.as_tensor(linear_sum_assignment(torch.cdist(a, b))[1]) for a, b in zip(ours, theirs, strict=True)]
    return [torch.stack([rows[place] for rows, place in zip(x, places, strict=True)]) for x in got]
