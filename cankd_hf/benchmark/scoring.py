"""`python -m cankd_hf.benchmark scoring`: segmentation scores from logits, against one `argmax` an image."""

from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import interpolate

from cankd_hf.benchmark.measure import against_plain, table
from cankd_hf.errors import InputError
from cankd_hf.metrics.segmentation import segmentation_areas

BATCH = 8
VOID = 255


def run_scoring(images: int, classes: int, size: Sequence[int], repeats: int, device: str, console: Console) -> float:
    """Prints seconds to score random logits, given at a quarter of `size`; returns the ratio to the plain form.

    CPU time of one thread on the CPU, wall-clock on an accelerator. Raises InputError if the counts differ.
    """
    place = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    grid = [max(1, side // 4) for side in size]
    logits = torch.randn(BATCH, classes, *grid, generator=generator).to(place)
    labels = torch.randint(0, classes, (BATCH, *size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.05] = VOID
    labels = labels.to(place)
    if not torch.equal(segmentation_areas(logits, labels, classes), _plain(logits, labels, classes)):
        raise InputError("scoring: expected the plain form's counts, got others; report the sizes")
    rounds = -(-images // BATCH)

    def ours() -> None:
        for _ in range(rounds):
            segmentation_areas(logits, labels, classes)

    def plain() -> None:
        for _ in range(rounds):
            _plain(logits, labels, classes)

    name = f"{rounds * BATCH} masks, {size[0]}x{size[1]}, {classes} classes"
    ratio, row = against_plain(ours, plain, repeats, place, name)
    title = f"Scoring from logits on {device}; the counts of both are the same"
    console.print(table(title, ("scored", "ours", "plain", "ratio"), [row]))
    return ratio


def _plain(logits: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Areas [B, 3, K] by `argmax(0)` and three `bincount` an image."""
    rows = []
    for one, target in zip(logits, labels, strict=True):
        resized = interpolate(one[None], size=target.shape, mode="bilinear", align_corners=False)[0]
        found, counted = resized.argmax(0), target != VOID
        parts = [found[counted & (found == target)], found[counted], target[counted]]
        rows.append(torch.stack([torch.bincount(part, minlength=classes) for part in parts]))
    return torch.stack(rows)
