"""The exportable forms of students: a module with plain inputs and outputs, and its comparison with the file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

# Largest difference in float32: absolute, plus relative to the output's largest value, since sums in another order
# differ by some units in the sixth digit.
TOLERANCE, RELATIVE = 1e-4, 1e-5
# In half precision: relative to the output's largest absolute value; of detections, the share that must agree.
LOOSE, LOOSE_SHARE = 0.05, 0.9
LOOSE_SCORE, LOOSE_BOX = 0.05, 0.02


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


class QueriesForm(ExportForm):
    """One row per query of a DETR-like detector, in any order."""

    def compare(self, wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
        """Compares in the file's order; if that fails, in the student's."""
        result = super().compare(wanted, got, shape, exact)
        if result.passed or result.error is not None:
            return result
        return super().compare(wanted, in_order(wanted, got), shape, exact)


class DetectionsForm(ExportForm):
    """Sets of detections (scores, labels, boxes), matched one to one."""

    compares_values = False

    def compare(self, wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
        """Compares detections in any order; each is matched once."""
        near_score, near_box = (TOLERANCE, TOLERANCE) if exact else (LOOSE_SCORE, LOOSE_BOX)
        total = missing = 0
        worst = 0.0
        for a_scores, a_labels, a_boxes, b_scores, b_labels, b_boxes in zip(*wanted, *got, strict=True):
            left = set(torch.where(b_scores > 0)[0].tolist())
            for row in torch.where(a_scores > 0)[0].tolist():
                total += 1
                apart = torch.maximum(
                    (b_scores - a_scores[row]).abs() / near_score,
                    (b_boxes - a_boxes[row]).abs().amax(dim=1) / near_box,
                )
                same = [other for other in left if b_labels[other] == a_labels[row]]
                other = min(same, key=lambda i: float(apart[i]), default=None)
                if other is None or apart[other] > 1:
                    missing += 1
                    continue
                left.remove(other)
                worst = max(worst, float(apart[other]) * near_score)
            missing += len(left)
        passed = missing == 0 if exact else missing <= 2 * (1 - LOOSE_SHARE) * total
        return Compared(shape, worst, near_score, total, missing, passed=passed)


def in_order(wanted: list[Tensor], got: list[Tensor]) -> list[Tensor]:
    """The file's outputs [B, N, *] with the queries in the student's order, as those of equal rank may be swapped."""
    ours, theirs = (torch.cat([x.flatten(2).float() for x in outputs], dim=2) for outputs in (wanted, got))
    places = [torch.as_tensor(linear_sum_assignment(torch.cdist(a, b))[1]) for a, b in zip(ours, theirs, strict=True)]
    return [torch.stack([rows[place] for rows, place in zip(x, places, strict=True)]) for x in got]
