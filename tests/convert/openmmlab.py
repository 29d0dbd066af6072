"""State dicts with OpenMMLab's names and random values, and its forward pass re-derived from these names alone.

The names, shapes and conventions are those of MMDetection 3.3 and MMSegmentation 1.2 (docs/convert.md says how the
converted models were compared with these themselves).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

State = dict[str, Tensor]
LAYERS, WIDTHS = (1, 1, 1, 1), (8, 12, 16, 24)  # of the tiny backbone; a block's output is four times as wide
GAIN = 1.2


def conv(name: str, out: int, into: int, kernel: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, into, kernel, kernel)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, width: int, running: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", *(("running_mean", "running_var") if running else ())):
        yield f"{name}.{part}", (width,)


def linear(name: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.weight", (out, into)), (f"{name}.bias", (out,)))


def resnet(
    layers: tuple[int, ...] = LAYERS,
    widths: tuple[int, ...] = WIDTHS,
    deep: bool = False,
    groups: int = 1,
    stem: int = 8,
    expansion: int = 4,
    inner: int = 1,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of bottlenecks; `inner` is how much wider their 3x3 convolution is than `widths`."""
    if deep:
        for place, (out, into) in {0: (stem // 2, 3), 3: (stem // 2, stem // 2), 6: (stem, stem // 2)}.items():
            yield from conv(f"backbone.stem.{place}", out, into, 3, False)
            yield from norm(f"backbone.stem.{place + 1}", out)
    else:
        yield from conv("backbone.conv1", stem, 3, 7, False)
        yield from norm("backbone.bn1", stem)
    into = stem
    for stage, (count, width) in enumerate(zip(layers, widths, strict=True), 1):
        for place in range(count):
            name, middle = f"backbone.layer{stage}.{place}", width * inner
            for number, (a, b, kernel, group) in enumerate(
                ((middle, into, 1, 1), (middle, middle, 3, groups), (width * expansion, middle, 1, 1)), 1
            ):
                yield from conv(f"{name}.conv{number}", a, b // group, kernel, False)
                yield from norm(f"{name}.bn{number}", a)
            if place == 0:
                yield from conv(f"{name}.downsample.0", width * expansion, into, 1, False)
                yield from norm(f"{name}.downsample.1", width * expansion)
            into = width * expansion


def fpn(width: int, laterals: list[int], extra: int | None, normed: bool = False) -> Iterator[tuple[str, Any]]:
    """`extra`: channels that level 6 reads; None: no levels by convolutions."""
    for place, into in enumerate(laterals):
        yield from conv(f"neck.lateral_convs.{place}.conv", width, into, 1, not normed)
        yield from norm(f"neck.lateral_convs.{place}.gn", width, False) if normed else ()
    sources = [width] * len(laterals) + ([] if extra is None else [extra, width])
    for place, into in enumerate(sources):
        yield from conv(f"neck.fpn_convs.{place}.conv", width, into, 3, not normed)
        yield from norm(f"neck.fpn_convs.{place}.gn", width, False) if normed else ()


def towers(names: tuple[str, ...], width: int, count: int, normed: bool, bias: bool) -> Iterator[tuple[str, Any]]:
    for name in names:
        for place in range(count):
            yield from conv(f"bbox_head.{name}.{place}.conv", width, width, 3, bias)
            yield from norm(f"bbox_head.{name}.{place}.gn", width, False) if normed else ()


def filled(shapes: Iterator[tuple[str, Any]] | list[tuple[str, Any]], seed: int = 0) -> State:
    """Random values that keep the size of maps."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes:
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value *= GAIN / value[0].numel() ** 0.5
        elif name.endswith("running_var"):
            value = 1 + 0.1 * value.abs()
        elif name.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value *= 0.1
        state[name] = value
    return state


def saved(file: Path, state: State, **meta: Any) -> Path:
    torch.save({"state_dict": state, "meta": meta}, file)
    return file


class Naive:
    """OpenMMLab's layers by their names."""

    def __init__(self, state: State, groups: int = 32) -> None:
        self.state, self.groups = state, groups

    def conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def batch(self, name: str, x: Tensor) -> Tensor:
        parts = (self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    def group(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in self.state:
            return x
        return F.group_norm(x, self.groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def backbone(self, x: Tensor, caffe: bool = False, dilations: tuple[int, ...] = (1, 1, 1, 1)) -> list[Tensor]:
        """Images as OpenMMLab has them -> the maps of the four stages. A dilated stage has no stride, and its first
        block half the dilation."""
        if "backbone.stem.0.weight" in self.state:
            for place, stride in ((0, 2), (3, 1), (6, 1)):
                x = self.conv(f"backbone.stem.{place}", x, stride=stride, padding=1)
                x = F.relu(self.batch(f"backbone.stem.{place + 1}", x))
        else:
            x = F.relu(self.batch("backbone.bn1", self.conv("backbone.conv1", x, stride=2, padding=3)))
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for stage, dilation in enumerate(dilations, 1):
            place = 0
            while (name := f"backbone.layer{stage}.{place}") + ".conv1.weight" in self.state:
                stride = 2 if place == 0 and stage > 1 and dilation == 1 else 1
                spread = max(dilation // 2, 1) if place == 0 else dilation
                x = self.bottleneck(name, x, stride, spread, caffe)
                place += 1
            maps.append(x)
        return maps

    def bottleneck(self, name: str, x: Tensor, stride: int, spread: int, caffe: bool) -> Tensor:
        first, second = (stride, 1) if caffe else (1, stride)
        weight = self.state[f"{name}.conv2.weight"]
        groups = len(weight) // weight.shape[1]
        y = F.relu(self.batch(f"{name}.bn1", self.conv(f"{name}.conv1", x, stride=first)))
        if f"{name}.conv2.conv_offset.weight" in self.state:
            at = self.conv(f"{name}.conv2.conv_offset", y, stride=second, padding=1)
            y = deform_conv2d(y, at, weight, stride=second, padding=1)
        else:
            y = self.conv(f"{name}.conv2", y, stride=second, padding=spread, dilation=spread, groups=groups)
        y = self.batch(f"{name}.bn3", self.conv(f"{name}.conv3", F.relu(self.batch(f"{name}.bn2", y))))
        if f"{name}.downsample.0.weight" in self.state:
            x = self.batch(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride=stride))
        return F.relu(x + y)

    def module(self, name: str, x: Tensor, **options: Any) -> Tensor:
        """Convolution and, if there is one, group norm."""
        return self.group(f"{name}.gn", self.conv(f"{name}.conv", x, **options))

    def neck(self, maps: list[Tensor], extra: str | None, relu: bool) -> list[Tensor]:
        """`extra`: `input` or `output`, what level 6 is made of; None: level 6 by pooling."""
        down = [self.module(f"neck.lateral_convs.{i}", x) for i, x in enumerate(maps)]
        for i in range(len(down) - 1, 0, -1):
            down[i - 1] = down[i - 1] + F.interpolate(down[i], size=down[i - 1].shape[2:], mode="nearest")
        found = [self.module(f"neck.fpn_convs.{i}", x, padding=1) for i, x in enumerate(down)]
        if extra is None:
            return [*found, F.max_pool2d(found[-1], 1, stride=2)]
        source = maps[-1] if extra == "input" else found[-1]
        found.append(self.module(f"neck.fpn_convs.{len(down)}", source, stride=2, padding=1))
        last = F.relu(found[-1]) if relu else found[-1]
        return [*found, self.module(f"neck.fpn_convs.{len(down) + 1}", last, stride=2, padding=1)]

    def tower(self, name: str, x: Tensor) -> Tensor:
        place = 0
        while f"bbox_head.{name}.{place}.conv.weight" in self.state:
            x = F.relu(self.module(f"bbox_head.{name}.{place}", x, padding=1))
            place += 1
        return x


def centres(maps: list[Tensor], strides: list[int], offset: float) -> list[Tensor]:
    """`[A, 2]` of each level: x and y of the cells, row by row."""
    found = []
    for x, stride in zip(maps, strides, strict=True):
        rows, columns = ((torch.arange(n) + offset) * stride for n in x.shape[-2:])
        found.append(torch.stack([columns.repeat(len(rows)), rows.repeat_interleave(len(columns))], 1))
    return found


def anchors(places: Tensor, stride: int, scale: float, octaves: int) -> Tensor:
    """Anchors `[A n, 4]` around the cells: ratios 0.5, 1, 2, each with its octave scales, never rounded."""
    boxes = []
    for ratio in (0.5, 1.0, 2.0):
        for octave in range(octaves):
            side = stride * scale * 2 ** (octave / octaves)
            half = torch.tensor([side / ratio**0.5 / 2, side * ratio**0.5 / 2])
            boxes.append(torch.cat([places - half, places + half], 1))
    return torch.stack(boxes, 1).reshape(-1, 4)


def decoded(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...] = (1, 1, 1, 1), size: Any = None) -> Tensor:
    """MMDetection's DeltaXYWHBBoxCoder: log sizes limited to +-log(1000 / 16), corners to the image."""
    deltas = deltas * torch.tensor(stds)
    sides = boxes[:, 2:] - boxes[:, :2]
    middle = (boxes[:, 2:] + boxes[:, :2]) / 2 + deltas[:, :2] * sides
    limit = torch.log(torch.tensor(1000 / 16))
    sides = sides * deltas[:, 2:].clamp(-limit, limit).exp()
    return clipped(torch.cat([middle - sides / 2, middle + sides / 2], 1), size)


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    return torch.stack([boxes[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], 1)
