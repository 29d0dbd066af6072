"""Runs a student's features through the rest of a frozen detector's head (CrossKD, arXiv 2306.11369)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import ceil, log2, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

# The towers of a dense detector's head, by the branch that reads them: of torchvision's heads, and of RepPoints.
_PATHS = (
    {"classes": "head.classification_head.conv", "boxes": "head.regression_head.conv"},
    {"classes": "head.class_tower", "boxes": "head.point_tower"},
)
Features = dict[str, list[Tensor]]  # of each tower, a map for each level


class Frame(NamedTuple):
    """What the maps of a model cover, in one unit: the image, and the area with the padding that the model adds."""

    image: tuple[int, int]
    covered: tuple[int, int]

    def shares(self) -> tuple[float, float]:
        """The part of the height and of the width that the image takes."""
        return self.image[0] / self.covered[0], self.image[1] / self.covered[1]


def tower_paths(model: nn.Module) -> dict[str, str]:
    """Where a detector's two towers are in its `head`; empty for a model without."""
    for paths in _PATHS:
        try:
            for path in paths.values():
                model.get_submodule(f"head.{path}")
        except AttributeError:
            continue
        return dict(paths)
    return {}


def layer_ends(tower: nn.Sequential) -> list[int]:
    """For each layer (a convolution with its norm and activation) the number of blocks up to its end; 0 first."""
    starts = [i for i, block in enumerate(tower) if any(isinstance(part, nn.Conv2d) for part in block.modules())]
    return [*starts, len(tower)]


def frame_of(model: nn.Module, size: tuple[int, int]) -> Frame:
    """The frame of a detector's maps for images of this size."""
    made: Any = getattr(model, "map_frame", None)
    return Frame(size, size) if made is None else Frame(*made(size))


class _Rest(nn.Module):
    """In the place of a tower: its last blocks, on given features instead of its input."""

    def __init__(self, blocks: Sequence[nn.Module], features: Sequence[Tensor]) -> None:
        super().__init__()
        self.blocks, self.features = nn.Sequential(*blocks), iter(features)

    def forward(self, _: Tensor) -> Tensor:
        result: Tensor = self.blocks(next(self.features))
        return result


def _with_part(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """A copy of a module with another part at a path; all else is shared with it."""
    first, _, rest = path.partition(".")
    made = copy.copy(module)
    own = module.get_submodule(first)
    made._modules = {**module._modules, first: _with_part(own, rest, part) if rest else part}
    return made


class TeacherHead:
    """The head of a frozen dense detector behind some of its layers. Not a module: it is no part of what is trained.

    Args:
        model: the detector.
        layer: number of layers of its towers that are left out.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model: Any = model
        self.layer = layer
        self.paths = tower_paths(model)

    @property
    def width(self) -> int:
        """Channels that it reads."""
        return int(self.model.levels[0][0])

    def __call__(self, features: Features, size: tuple[int, int]) -> dict[str, Tensor]:
        """Its predictions at all anchors, as `FPNObjectDetectionOutput.dense`, with the gradient of the features.

        Args:
            features: of each tower a map [B, C, h, w] for each level.
            size: height and width of the detector's images.
        """
        head, frame = self.model.head, frame_of(self.model, size)
        for name, path in self.paths.items():
            tower: Any = self.model.head.get_submodule(path)
            rest = list(tower)[layer_ends(tower)[self.layer] :]
            head = _with_part(head, path, _Rest(rest, features[name]))
        maps = features["classes"]
        images = ImageList(maps[0].new_empty(0, 3, *frame.covered), [frame.image] * len(maps[0]))
        dense: dict[str, Tensor] = {}
        head(maps, images, None, dense)
        scale = torch.tensor([frame.image[1], frame.image[0]] * 2).to(maps[0].device, non_blocking=True)
        return {**dense, "boxes": dense["boxes"] / scale, "centres": dense["centres"] / scale[:2]}

    def level_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of the map of each level for its images of this size."""
        covered = frame_of(self.model, size).covered
        return [(ceil(covered[0] / stride), ceil(covered[1] / stride)) for _, stride in self.model.levels]

    def place(self, maps: Sequence[Tensor], ours: Frame, size: tuple[int, int]) -> list[Tensor]:
        """The map [B, C, h, w] of the nearest stride for each level, on that level's cells.

        Args:
            maps: of a student, for the same images.
            ours: what these maps cover.
            size: height and width of the detector's images.
        """
        theirs = frame_of(self.model, size)
        cells = [sqrt(x.shape[-2] * x.shape[-1] * ours.shares()[0] * ours.shares()[1]) for x in maps]
        placed = []
        for wanted in self.level_sizes(size):
            side = sqrt(wanted[0] * wanted[1] * theirs.shares()[0] * theirs.shares()[1])
            apart = [abs(log2(one / side)) for one in cells]
            nearest = apart.index(min(apart))
            placed.append(_fitted(maps[nearest], ours.shares(), wanted, theirs.shares()))
        return placed


def _fitted(x: Tensor, ours: tuple[float, float], size: tuple[int, int], theirs: tuple[float, float]) -> Tensor:
    """A map on a grid of another size, on both of which the image takes these shares of the sides."""
    if max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6:
        return _resized(x, size)
    rows, columns = (ceil(n * share) for n, share in zip(x.shape[-2:], ours, strict=True))
    inner = [ceil(n * share) for n, share in zip(size, theirs, strict=True)]
    made = _resized(x[..., :rows, :columns], (inner[0], inner[1]))
    return F.pad(made, (0, size[1] - inner[1], 0, size[0] - inner[0]))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    shrinks = size[0] < x.shape[-2] or size[1] < x.shape[-1]
    made = F.interpolate(x.float(), size=size, mode="bilinear", align_corners=False, antialias=shrinks)
    return made.to(x.dtype)


class Towers:
    """Forward hooks that keep the features behind a layer of a student's two towers.

    Args:
        model: the student.
        layer: after how many layers.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.features: Features = {}
        self._listening = False
        self._handles = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._end)]
        for name, path in tower_paths(model).items():
            tower: Any = model.get_submodule(f"head.{path}")
            block = tower[layer_ends(tower)[layer] - 1]
            self._handles.append(block.register_forward_hook(self._keeper(name)))

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._listening:
                self.features.setdefault(name, []).append(output)

        return keep

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.features, self._listening = {}, True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._listening = False


def deepest_layer(model: nn.Module) -> int:
    """Number of layers of a model's towers; 0 of a model without."""
    ends = [layer_ends(model.get_submodule(f"head.{path}")) for path in tower_paths(model).values()]  # type: ignore[arg-type]
    return min((len(one) - 1 for one in ends), default=0)


def layers_taken(student: nn.Module, teacher: nn.Module, asked: int | None) -> int | None:
    """How many layers of the towers are the student's; None if it, or the teacher, has fewer than asked for."""
    most = min(deepest_layer(student), deepest_layer(teacher))
    if asked is not None:
        return asked if asked <= most or asked == 0 else None
    return min(most, max(deepest_layer(teacher) - 1, 0))
