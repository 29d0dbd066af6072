"""The generated data set: shapes on textured backgrounds, for tests, the quickstart and trials without a download.

Only its outline identifies a shape: background and shapes draw their colours and textures from the same distribution,
so that no colour, stripe or brightness gives a class away, and shapes occlude one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cankd_hf.config.data import GENERATED
from cankd_hf.data.common.decode import Sample
from cankd_hf.data.common.targets import ClassId, DepthMap, Mask
from cankd_hf.errors import InputError

SHAPE_CLASSES = {0: "ground", 1: "disc", 2: "ring", 3: "square", 4: "triangle", 5: "star"}
SHAPE_PALETTE = {
    0: (40, 44, 52),
    1: (86, 180, 233),
    2: (230, 159, 0),
    3: (0, 158, 115),
    4: (204, 121, 167),
    5: (240, 228, 66),
}
NEAREST, FARTHEST, HAZE = 1.0, 10.0, 6.0  # metres, of the generated distances
HORIZON = 0.25  # of the height
SPLITS = {"train": 0, "validation": 1, "test": 2, "unlabelled": 3}


@dataclass(eq=False)
class ShapesSource:
    """A split of the generated set: `size` square images of `pixels`, with or without masks.

    Sample `index` of a split is the same on every machine and in every run with the same seed.
    """

    split: str
    size: int
    pixels: int = 96
    seed: int = 0
    masks: bool = True
    generated = True

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"shapes/{self.split}/{index}"

    def load(self, index: int) -> Sample:
        """Draw image [3, H, W] and mask [H, W]."""
        image, shapes = self.drawn(index)
        mask = np.zeros((self.pixels, self.pixels), dtype=np.uint8)
        for label, inside in shapes:
            mask[inside] = label
        target = Mask(torch.from_numpy(mask)) if self.masks else None
        return Sample(image, target, self.name(index))

    def drawn(self, index: int) -> tuple[torch.Tensor, list[tuple[int, np.ndarray]]]:
        """Draw image [3, H, W] and its shapes: class and pixels [H, W], the last one on top of the others."""
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name(index)}: the split holds {self.size} images")
        random = np.random.default_rng([self.seed, SPLITS[self.split], index])
        image = _texture(random, self.pixels)
        shapes = []
        for _ in range(random.integers(3, 7)):
            label = int(random.integers(1, len(SHAPE_CLASSES)))
            inside = _outline(random, label, self.pixels)
            image = np.where(inside, _texture(random, self.pixels), image)
            shapes.append((label, inside))
        image = image * _light(random, self.pixels) + random.normal(0, 6, image.shape)
        return torch.from_numpy(np.clip(image, 0, 255).astype(np.uint8)), shapes


@dataclass(eq=False)
class DepthSource(ShapesSource):
    """The same with distances in place of classes: a ground that rises to the horizon, and shapes that stand on it.

    Nothing but the picture tells the distance: what is far is small, stands higher, and fades into the haze.
    """

    def load(self, index: int) -> Sample:
        """Draw image [3, H, W] and depth [H, W]."""
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name(index)}: the split holds {self.size} images")
        random = np.random.default_rng([self.seed, SPLITS[self.split], index, 1])
        rows = (np.arange(self.pixels) + 0.5) / self.pixels
        # the ground of a camera at a fixed height: the distance is as the inverse of the rows below the horizon
        ground = NEAREST / np.maximum((rows - HORIZON) / (1 - HORIZON), NEAREST / FARTHEST)
        depth = np.repeat(ground[:, None], self.pixels, 1)
        image = _texture(random, self.pixels)
        for distance in sorted(random.uniform(1.5 * NEAREST, 0.8 * FARTHEST, random.integers(3, 7)), reverse=True):
            radius = 0.4 * NEAREST / distance + 0.04
            foot = HORIZON + (1 - HORIZON) * NEAREST / distance
            place = (foot - 0.7 * radius) * self.pixels, random.uniform(0.1, 0.9) * self.pixels
            inside = _outline(random, int(random.integers(1, len(SHAPE_CLASSES))), self.pixels, radius, place)
            image = np.where(inside, _texture(random, self.pixels), image)
            depth = np.where(inside, distance, depth)
        seen = np.exp(-(depth - NEAREST) / HAZE)
        image = image * seen + 225 * (1 - seen) + random.normal(0, 4, image.shape)
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        target = DepthMap(torch.from_numpy(depth.astype(np.float32))) if self.masks else None
        return Sample(torch.from_numpy(pixels), target, self.name(index))


@dataclass(eq=False)
class ShapeSource(ShapesSource):
    """The same with one shape in each image, which gives it its class: 0..4."""

    def load(self, index: int) -> Sample:
        """Draw image [3, H, W]."""
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name(index)}: the split holds {self.size} images")
        random = np.random.default_rng([self.seed, SPLITS[self.split], index, 2])
        label, radius = int(random.integers(1, len(SHAPE_CLASSES))), random.uniform(0.2, 0.4)
        inside = _outline(random, label, self.pixels, radius, random.uniform(0.35, 0.65, 2) * self.pixels)
        image = np.where(inside, _texture(random, self.pixels), _texture(random, self.pixels))
        image = image * _light(random, self.pixels) + random.normal(0, 6, image.shape)
        pixels = np.clip(image, 0, 255).astype(np.uint8)
        return Sample(torch.from_numpy(pixels), ClassId(label - 1) if self.masks else None, self.name(index))


def generated_splits(sizes: dict[str, int], masks: bool = True, kind: str = "masks") -> dict[str, ShapesSource]:
    """The splits, with `sizes` in place of the defaults of `GENERATED`, and with labels of this kind. Raises
    InputError for a size below 1, a seed below 0 or images under 16 pixels."""
    values = GENERATED | sizes
    problems = [f"data.generated.{key}: expected at least 1, got {values[key]}" for key in SPLITS if values[key] < 1]
    if values["size"] < 16:
        problems.append(f"data.generated.size: expected at least 16 pixels, got {values['size']}")
    if values["seed"] < 0:
        problems.append(f"data.generated.seed: expected 0 or more, got {values['seed']}")
    if problems:
        raise InputError(problems)
    made = KINDS[kind]
    return {split: made(split, values[split], values["size"], values["seed"], masks) for split in SPLITS}


KINDS: dict[str, type[ShapesSource]] = {"masks": ShapesSource, "depths": DepthSource, "classes": ShapeSource}


def _outline(
    random: np.random.Generator,
    label: int,
    pixels: int,
    radius: float | None = None,
    centre: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Whether each pixel lies inside a shape of random angle, and of random size and position where they are not
    given: [H, W], bool. `radius` is a part of the picture, `centre` in pixels."""
    radius = (random.uniform(0.12, 0.26) if radius is None else radius) * pixels
    middle = random.uniform(0.1, 0.9, 2) * pixels if centre is None else centre
    turn = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:pixels, 0:pixels] + 0.5
    y, x = (y - middle[0]) / radius, (x - middle[1]) / radius
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    distance = np.hypot(u, v)
    if label == 1:
        return distance < 0.9
    if label == 2:
        return (distance < 1) & (distance > 0.55)
    if label == 3:
        return np.maximum(np.abs(u), np.abs(v)) < 0.8
    if label == 4:
        return (v > -0.6) & (v + np.sqrt(3) * np.abs(u) < 1.2)
    angle = np.arctan2(v, u) * 5 / (2 * np.pi)
    return distance < 0.45 + 0.75 * np.abs(2 * (angle - np.floor(angle)) - 1) ** 1.3


def _texture(random: np.random.Generator, pixels: int) -> np.ndarray:
    """[3, H, W] in about 0..255: a colour, varied along another one by stripes and smooth noise."""
    colour = random.uniform(40, 215, (3, 1, 1))
    direction = random.normal(0, 1, (3, 1, 1))
    direction *= random.uniform(15, 45) / np.abs(direction).max()
    y, x = np.mgrid[0:pixels, 0:pixels] / pixels
    angle, waves, phase = random.uniform(0, np.pi), random.uniform(3, 14), random.uniform(0, 2 * np.pi)
    stripes = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    cells = int(random.integers(4, 13))
    return colour + direction * (random.uniform(0, 1) * stripes + _smooth_noise(random, cells, pixels))


def _smooth_noise(random: np.random.Generator, cells: int, pixels: int) -> np.ndarray:
    """[H, W]: values of a coarse grid, interpolated."""
    grid = random.normal(0, 0.7, (cells + 1, cells + 1))
    place = (np.arange(pixels) + 0.5) / pixels * cells
    low = place.astype(int)
    part = place - low
    rows = grid[low] * (1 - part)[:, None] + grid[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _light(random: np.random.Generator, pixels: int) -> np.ndarray:
    """[H, W] around 1: brightness falls off to one side."""
    slope = random.uniform(-0.35, 0.35, 2)
    y, x = np.mgrid[0:pixels, 0:pixels] / pixels - 0.5
    return 1 + slope[0] * y + slope[1] * x
