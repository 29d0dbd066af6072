"""Masks that are drawn from the outlines of objects, as they are asked for."""

from dataclasses import dataclass

import numpy as np
import torch

from cankd_hf.data.common.decode import Sample, Unusable
from cankd_hf.data.common.folders import FolderSource
from cankd_hf.data.common.targets import Mask
from cankd_hf.data.detection.outlines import Outlines

VOID = -1  # label of what nobody said, until the number of void is known


@dataclass(frozen=True)
class DrawnMasks:
    """A mask for each of n images, from the outlines of its objects, of which the smaller lies on top.

    The box of an object without an outline is void. All is in arrays, which loading processes share.

    Attributes:
        outlines: those of all N objects.
        order: their places in `outlines`, by image, [N].
        ends: objects ends[i]..ends[i + 1] of `order` are those of image i, [n + 1].
        labels: of each object, [N].
        fill: label of the pixels that no outline covers.
        boxes: [N, 4], x, y, width, height.
        sizes: width and height of the pictures that the outlines are for, [n, 2]; not above 0 where nobody says.
        shares: whether boxes and outlines are in shares of the image.
    """

    outlines: Outlines
    order: np.ndarray
    ends: np.ndarray
    labels: np.ndarray
    fill: int
    boxes: np.ndarray
    sizes: np.ndarray | None = None
    shares: bool = False

    def draw(self, index: int, height: int, width: int, name: str) -> np.ndarray:
        """The mask of an image, int32 [height, width]. Raises Unusable for one of another size than its outlines."""
        stated = [width, height] if self.sizes is None else self.sizes[index].tolist()
        if min(stated) > 0 and stated != [width, height]:
            said = f"{stated[0]} x {stated[1]} pixels, the image has {width} x {height}"
            raise Unusable(f"{name}: outlines are for {said}; correct one of them")
        canvas = np.full((height, width), self.fill, np.int32)
        scale = (width, height) if self.shares else (1, 1)
        shapes = []
        for place in self.order[self.ends[index] : self.ends[index + 1]].tolist():
            if not self.outlines.has(place):
                x, y, across, down = self.boxes[place] * (*scale, *scale)
                canvas[_inside(y, y + down, height), _inside(x, x + across, width)] = VOID
                continue
            try:
                shapes.append((self.outlines.draw(place, height, width, scale), self.labels[place]))
            except ValueError as error:
                raise Unusable(f"{name}: an outline cannot be drawn: {error}") from None
        for pixels, label in sorted(shapes, key=lambda shape: -int(shape[0].sum())):
            canvas[pixels] = label
        return canvas


def _inside(first: float, last: float, size: int) -> slice:
    return slice(max(0, round(first)), max(0, min(size, round(last))))


@dataclass(eq=False)
class DrawnSource(FolderSource):
    """Images of a folder with masks that are drawn."""

    drawn: DrawnMasks

    @property
    def unlabelled(self) -> list[int]:
        """None: where nothing is outlined, the mask says so."""
        return []

    def without_labels(self) -> tuple[FolderSource, list[int]]:
        return self.alone(), []

    def load(self, index: int) -> Sample:
        row = self.rows[index]
        sample = self.decoder.pair((row.image, row.name), None)
        height, width = sample.image.shape[-2:]
        labels = self.drawn.draw(index, height, width, row.name)
        void = self.decoder.ignore_index
        labels[labels == VOID] = void
        small = labels.min() >= 0 and labels.max() <= 255 and 0 <= void <= 255
        mask = torch.from_numpy(labels.astype(np.uint8) if small else labels)
        return sample._replace(target=Mask(mask, void))
