"""The features of a frozen model: one map of an image, from one level or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cankd_hf.teachers.teacher import Teacher

STRIDE = 8  # maps finer than this are not read as they are: at a quarter of its cells, a pyramid says as much


class Frozen:
    """One map of a frozen model.

    A model whose levels have one stride (a plain ViT) gives its last one. Of a pyramid all levels are resized to its
    finest of at least stride 8 (else its coarsest) and concatenated along the channels.

    Args:
        teacher: the model, see `load_teacher`.
        size: height and width of the images.
    """

    def __init__(self, teacher: Teacher, size: tuple[int, int]) -> None:
        self.teacher = teacher
        levels = teacher.levels(size)
        strides = [level.stride for level in levels]
        self.one = max(strides) < 1.01 * min(strides)
        fit = [index for index, stride in enumerate(strides) if stride > 0.99 * STRIDE]
        target = len(levels) - 1 if self.one or not fit else min(fit, key=lambda index: strides[index])
        self.stride, self.grid = strides[target], levels[target].size
        self.channels = levels[-1].channels if self.one else sum(level.channels for level in levels)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Maps `[B, C, h, w]`, float32 on the CPU, of images `[B, 3, H, W]` normalised with ImageNet's statistics."""
        maps = list(self.teacher(pixel_values))[-1:] if self.one else list(self.teacher(pixel_values))
        resized = [
            level.float()
            if tuple(level.shape[-2:]) == tuple(self.grid)
            else interpolate(level.float(), self.grid, mode="bilinear", antialias=True)
            for level in maps
        ]
        return torch.cat(resized, 1).cpu()


def batches(samples: Iterable[dict[str, Any]], size: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """Images `[B, 3, H, W]` of samples with `pixel_values` of one size, and their labels."""
    images, labels = list[Tensor](), list[Any]()
    for sample in samples:
        images.append(torch.as_tensor(sample["pixel_values"]))
        labels.append(sample["labels"])
        if len(images) == size:
            yield torch.stack(images), labels
            images, labels = [], []
    if images:
        yield torch.stack(images), labels


def at_cells(labels: Tensor, grid: Sequence[int]) -> Tensor:
    """Labels `[h, w]` at the centres of the cells of a map, from `[H, W]`."""
    return interpolate(labels[None, None].double(), tuple(grid), mode="nearest-exact")[0, 0].to(labels.dtype)
