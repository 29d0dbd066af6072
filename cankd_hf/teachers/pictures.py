"""What a stored teacher is asked about for a batch: its pictures, or the whole images that these are of."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cankd_hf.data.common.batch import PICTURES, Batch
from cankd_hf.data.common.places import bilinear
from cankd_hf.teachers.store import Seen

LARGE = 1 << 16  # values of an image's map: on a CPU, others are cut out faster all at once
Parts = Iterator[tuple[list[int], Tensor]]


class Grid(NamedTuple):
    """The cells of a map of a picture.

    Attributes:
        size: height and width in cells.
        covers: height and width of the picture's part under them, in pixels, from its top left corner; it may go
            beyond the picture.
    """

    size: tuple[int, int]
    covers: tuple[int, int]


class Pictures(Protocol):
    """Pictures of a batch, each with its identity."""

    @property
    def keys(self) -> Sequence[bytes]:
        """The identity of each."""

    @property
    def device(self) -> torch.device:
        """Where answers are wanted."""

    def images(self, places: list[int]) -> Parts:
        """What the teacher sees of some of them, by their places in the batch: groups of one size, `[n, 3, H, W]`,
        normalised for the student, on the device."""

    def seen(self) -> list[Seen]:
        """What each is of; it may wait for the device."""

    def cut(
        self, places: Sequence[int], fields: Mapping[str, Tensor], types: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """Fields of an answer as those of the pictures of the batch, in types that hold their values exactly."""


@dataclass(frozen=True)
class Views:
    """The pictures that a batch holds: crops, flips and colours of images."""

    batch: Batch

    @property
    def keys(self) -> Sequence[bytes]:
        found: Sequence[bytes] = self.batch[PICTURES]
        return found

    @property
    def device(self) -> torch.device:
        return self.batch.teacher_images.device

    def images(self, places: list[int]) -> Parts:
        images = self.batch.teacher_images
        yield places, images if len(places) == len(images) else images[places]

    def seen(self) -> list[Seen]:
        images, meta = self.batch.teacher_images, self.batch.meta
        numbers = (meta[name].tolist() if name in meta else [-1] * len(images) for name in ("sample", "view"))
        return [Seen(sample, view, images.shape[-2], images.shape[-1]) for sample, view in zip(*numbers, strict=True)]

    def cut(
        self, places: Sequence[int], fields: Mapping[str, Tensor], types: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        return {name: value.to(types[name]) for name, value in fields.items()}


@dataclass(frozen=True)
class WholeImages:
    """The whole images that the pictures of a batch show a part of, mirrored where these are.

    An answer for a whole image is resampled bilinearly where the picture is. It is the same for all scales and colours
    of the picture.

    Attributes:
        keys: the identity of each.
        sample: their numbers in the training set, int64 [B].
        place: see `Batch`, float32 [B, 5].
        device: where answers are wanted.
        load: an image by its number, `[3, H, W]`, normalised, see `whole_image`.
        grids: of each field of an answer for a picture.
    """

    keys: Sequence[bytes]
    sample: Tensor
    place: Tensor
    device: torch.device
    load: Callable[[int], Tensor]
    grids: Mapping[str, Grid]

    def images(self, places: list[int]) -> Parts:
        groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        seen = self.seen()
        for place in places:
            image = self.load(seen[place].sample)
            image = image.flip(-1) if seen[place].view else image
            groups.setdefault(image.shape, []).append((place, image))
        for group in groups.values():
            yield [place for place, _ in group], torch.stack([image for _, image in group]).to(self.device)

    def seen(self) -> list[Seen]:
        both = zip(self.sample.tolist(), self.place[:, 4].tolist(), strict=True)
        return [Seen(number, int(mirrored), 0, 0) for number, mirrored in both]

    def cut(
        self, places: Sequence[int], fields: Mapping[str, Tensor], types: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        boxes = self.place[:, :4]
        if list(places) != list(range(len(boxes))):
            boxes = boxes[list(places)]
        return {name: cut_out(value, boxes, self.grids[name]).to(types[name]) for name, value in fields.items()}


def cut_out(maps: Tensor, boxes: Tensor, grid: Grid) -> Tensor:
    """Maps of whole images, resampled bilinearly for pictures of a part of each; beyond an image, its edge goes on.

    Args:
        maps: `[B, C, H, W]`, which cover their images.
        boxes: left, top, right and bottom of each image in pixels of its picture, `[B, 4]`.
        grid: of the result.

    Returns:
        `[B, C, h, w]`, float32.
    """
    if maps.device.type == "cpu" and maps.shape[1] * math.prod(grid.size) >= LARGE:
        made = _by_products(maps, boxes, grid)
        if made.sum().isfinite():  # else zero times infinity, which is no number, may have spread
            return made
    corner, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]  # x, y
    sides = boxes.new_tensor([grid.covers[1], grid.covers[0]])
    theta = boxes.new_zeros(len(boxes), 2, 3)  # from -1..1 over the grid to -1..1 over the image
    theta[:, [0, 1], [0, 1]] = sides / extent
    theta[:, :, 2] = (sides - 2 * corner) / extent - 1
    where = F.affine_grid(theta, [len(maps), 1, *grid.size], align_corners=False)
    return F.grid_sample(maps.float(), where, mode="bilinear", padding_mode="border", align_corners=False)


def _by_products(maps: Tensor, boxes: Tensor, grid: Grid) -> Tensor:
    """The same image by image, of the part of its map under the picture alone, as products of matrices."""
    made = torch.empty(len(maps), maps.shape[1], *grid.size)
    down, across = ((torch.arange(n) + 0.5) * (pixels / n) for n, pixels in zip(*grid, strict=True))
    for result, one, (left, top, right, bottom) in zip(made, maps, boxes.tolist(), strict=True):
        rows, of_rows = bilinear(down, top, bottom, one.shape[1])
        columns, of_columns = bilinear(across, left, right, one.shape[2])
        part = one[:, rows, columns].float() @ of_columns.T
        torch.bmm(of_rows.expand(len(part), -1, -1), part, out=result)
    return made
