"""Compares the outputs of the file with those of PyTorch, at several batch sizes and image sizes."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from cankd_hf.export.files import Runner, one_line
from cankd_hf.export.source import Source
from cankd_hf.tasks.export_forms import TOLERANCE, Compared, ExportForm

# Where that is larger: this multiple of the student's own rounding error, but never above MOST.
NOISE, MOST = 10.0, 1e-3


def pictures(batch: int, height: int, width: int) -> Tensor:
    """Noise with bright rectangles, so that a detector finds something; always the same."""
    generator = torch.Generator().manual_seed(batch * 7919 + height * 31 + width)
    images = 0.3 * torch.randn(batch, 3, height, width, generator=generator)
    for image in images:
        for _ in range(6):
            y, x = (int(torch.randint(0, side * 3 // 4, (), generator=generator)) for side in (height, width))
            h, w = (int(torch.randint(side // 8, side // 3, (), generator=generator)) for side in (height, width))
            image[:, y : y + h, x : x + w] += 2 * torch.randn(3, 1, 1, generator=generator)
    return images


def accepted(source: Source, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The sizes that the student itself takes: RT-DETR needs multiples of its coarsest stride."""
    found = []
    for size in sizes:
        try:
            with torch.no_grad():
                source.model(pixel_values=torch.zeros(1, 3, *size))
        except (RuntimeError, ValueError):
            continue
        found.append(size)
    return found


def compare(
    source: Source, form: ExportForm, runner: Runner, shapes: Sequence[tuple[int, int, int]], exact: bool
) -> list[Compared]:
    """Runs student and file on the same images; `exact`: the file is in float32."""
    found = []
    for shape in shapes:
        images = pictures(*shape)
        wanted = form.expected(source.model, images)
        listed = list(images.shape)
        try:
            got = runner(images)
        except Exception as error:  # whatever the runtime raises
            found.append(Compared(listed, float("inf"), TOLERANCE, error=one_line(error), passed=False))
            continue
        result = form.compare(wanted, got, listed, exact)
        if form.compares_values and exact and not result.passed and result.error is None:
            result.allowed = max(result.allowed, min(NOISE * _rounding(source, form, images, wanted), MOST))
            result.passed = result.difference <= result.allowed
        found.append(result)
    return found


def _rounding(source: Source, form: ExportForm, images: Tensor, wanted: list[Tensor]) -> float:
    """Largest difference between the student in float32 and in float64; no file can be expected to be closer.

    Norms of small values amplify rounding: for a DINOv2 pyramid of random weights it is 1e-4 at outputs of 3.
    """
    exact = form.expected(copy.deepcopy(source.model).double(), images.double())
    return max(float((a.double() - b).abs().max()) for a, b in zip(wanted, exact, strict=True))


def problem(result: Compared) -> str:
    """Where and how the file differs, in one line."""
    place = "batch {0}, {2} x {3}".format(*result.shape)
    if result.error:
        return f"{place}: {result.error}"
    if result.missing:
        return f"{place}: {result.missing} of {result.detections} detections are not in both"
    return f"{place}: differs by {result.difference:.2e}, allowed is {result.allowed:.2e}"
