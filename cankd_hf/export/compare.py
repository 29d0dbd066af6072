"""Does the file give what PyTorch gives? At several batch sizes and sizes, odd ones among them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from cankd_hf.export.files import Runner
from cankd_hf.export.graph import Form
from cankd_hf.export.source import Source

# Largest difference in float32: absolute, and of the output's largest value on top, since sums taken in another order
# differ by some units in the sixth digit whatever their size.
TOLERANCE, RELATIVE = 1e-4, 1e-5
# Where that is more: so many times the student's own rounding, as another library rounds elsewhere; never above MOST.
NOISE, MOST = 10.0, 1e-3
# In half precision: of the output's largest absolute value; and of detections, the share that must be found again.
LOOSE, LOOSE_SHARE = 0.05, 0.9
LOOSE_SCORE, LOOSE_BOX = 0.05, 0.02


@dataclass
class Compared:
    """One comparison.

    Args:
        shape: of `pixel_values`.
        difference: the largest absolute one over all outputs (of detections found in both).
        allowed: what it may be.
        detections: of the reference, where there are such.
        missing: detections that only one of the two has.
        error: where the file does not run at all.
    """

    shape: list[int]
    difference: float
    allowed: float
    detections: int | None = None
    missing: int = 0
    error: str | None = None
    passed: bool = True


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Noise with bright rectangles, so that a detector has something to say; always the same."""
    generator = torch.Generator().manual_seed(batch * 7919 + height * 31 + width)
    images = 0.3 * torch.randn(batch, 3, height, width, generator=generator)
    for image in images:
        for _ in range(6):
            y, x = (int(torch.randint(0, side * 3 // 4, (), generator=generator)) for side in (height, width))
            h, w = (int(torch.randint(side // 8, side // 3, (), generator=generator)) for side in (height, width))
            image[:, y : y + h, x : x + w] += 2 * torch.randn(3, 1, 1, generator=generator)
    return images


def other_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Larger, odd, and turned."""
    height, width = size
    return [(height + 32, width), (height + 13, width + 37), (width, height)]


def accepted(source: Source, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those sizes that the student itself takes: RT-DETR wants multiples of its coarsest stride."""
    found = []
    for size in sizes:
        try:
            with torch.no_grad():
                source.model(pixel_values=torch.zeros(1, 3, *size))
        except (RuntimeError, ValueError):
            continue
        found.append(size)
    return found


def shapes(size: tuple[int, int], others: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Batch, height and width of every comparison: the traced size first."""
    return [(1, *size), (3, *size), *((2 - i % 2, *other) for i, other in enumerate(others))]


def expected(source: Source, form: Form, images: Tensor) -> list[Tensor]:
    """What the student itself gives, in the outputs' convention, through its own forward."""
    model: Any = source.model
    with torch.no_grad():
        output = model(pixel_values=images)
    if source.task == "features":
        return list(output.feature_maps)
    if not form.detects():
        return [output[name] for name in form.outputs]
    scores, labels = output.logits.sigmoid().max(dim=-1)
    return [scores, torch.where(scores > 0, labels, -1), box_convert(output.pred_boxes, "cxcywh", "xyxy")]


def compare(
    source: Source, form: Form, runner: Runner, shapes: Sequence[tuple[int, int, int]], exact: bool
) -> list[Compared]:
    """Runs student and file on the same images; `exact`: the file is in float32."""
    found = []
    for shape in shapes:
        images = pictures(*shape)
        wanted = expected(source, form, images)
        listed = list(images.shape)
        try:
            got = runner(images)
        except Exception as error:  # whatever the runtime raises
            reason = " ".join(str(error).split())[:250]
            found.append(Compared(listed, float("inf"), TOLERANCE, error=reason, passed=False))
            continue
        if form.detects():
            found.append(_sets(wanted, got, listed, exact))
            continue
        result = _tensors(wanted, got, listed, exact)
        if source.task == "detection" and not result.passed and result.error is None:
            result = _tensors(wanted, _in_order(wanted, got), listed, exact)
        if exact and not result.passed and result.error is None:
            own = min(NOISE * rounding(source, form, images, wanted), MOST)
            result.allowed = max(result.allowed, own)
            result.passed = result.difference <= result.allowed
        found.append(result)
    return found


def rounding(source: Source, form: Form, images: Tensor, wanted: list[Tensor]) -> float:
    """How far the student in float32 is from itself in float64: no file can be expected to come nearer to it.

    Norms of small values enlarge rounding: a DINOv2 pyramid of random weights is 1e-4 off at outputs of 3.
    """
    double = Source(source.name, source.task, copy.deepcopy(source.model).double())
    exact = expected(double, form, images.double())
    return max(float((a.double() - b).abs().max()) for a, b in zip(wanted, exact, strict=True))


def _tensors(wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
    """Every output by its own measure: what is reported is the one that comes nearest to its limit, or exceeds it."""
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


def _in_order(wanted: list[Tensor], got: list[Tensor]) -> list[Tensor]:
    """The queries of a DETR-like detector in the order of the student's: those of equal rank may change places.

    Args:
        wanted: outputs `[B, N, *]` that belong together row by row.
        got: the same of the file.
    """
    ours, theirs = (torch.cat([x.flatten(2).float() for x in outputs], dim=2) for outputs in (wanted, got))
    places = [torch.as_tensor(linear_sum_assignment(torch.cdist(a, b))[1]) for a, b in zip(ours, theirs, strict=True)]
    return [torch.stack([rows[place] for rows, place in zip(x, places, strict=True)]) for x in got]


def _sets(wanted: list[Tensor], got: list[Tensor], shape: list[int], exact: bool) -> Compared:
    """Detections in any order; each may be met once."""
    near_score, near_box = (TOLERANCE, TOLERANCE) if exact else (LOOSE_SCORE, LOOSE_BOX)
    total = missing = 0
    worst = 0.0
    for a_scores, a_labels, a_boxes, b_scores, b_labels, b_boxes in zip(*wanted, *got, strict=True):
        left = set(torch.where(b_scores > 0)[0].tolist())
        for row in torch.where(a_scores > 0)[0].tolist():
            total += 1
            apart = torch.maximum(
                (b_scores - a_scores[row]).abs() / near_score, (b_boxes - a_boxes[row]).abs().amax(dim=1) / near_box
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


def problem(result: Compared) -> str:
    """Where and how the file differs, in one line."""
    place = "batch {0}, {2} x {3}".format(*result.shape)
    if result.error:
        return f"{place}: {result.error}"
    if result.missing:
        return f"{place}: {result.missing} of {result.detections} detections are not in both"
    return f"{place}: differs by {result.difference:.2e}, allowed is {result.allowed:.2e}"
