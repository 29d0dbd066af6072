"""The objects of all images of a split in a few arrays, which forked processes share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np

from cankd_hf.data.common.dataset import Known
from cankd_hf.data.detection.objects import TOLERANCE, Annotation
from cankd_hf.data.detection.outlines import Outlines

NO_SIZE = -1


@dataclass(eq=False)
class AnnotationTable(Sequence[Annotation]):
    """Annotations of n images with N objects in all; those with a fault, or of an odd form, in `odd`."""

    ends: np.ndarray  # int64 [n + 1]: objects ends[i]..ends[i + 1] are those of image i
    boxes: np.ndarray  # float64 [N, 4]
    classes: np.ndarray  # int64 [N]
    area: np.ndarray  # float64 [N]
    iscrowd: np.ndarray  # int64 [N]
    image_ids: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int64 [n, 2], width and height in the metadata, or NO_SIZE
    odd: Mapping[int, Annotation] = field(default_factory=dict)
    outlines: Outlines | None = None  # where masks are read
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of the objects in `outlines`, [N]

    @classmethod
    def of(cls, annotations: Iterable[Annotation]) -> "AnnotationTable":
        """The same annotations."""
        odd: dict[int, Annotation] = {}
        counts, ids, sizes = [0], [], []
        outlines: Outlines | None = None
        parts = [(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))]
        for number, note in enumerate(annotations):
            size = note.size or (NO_SIZE, NO_SIZE)
            usual = note.size is None or all(0 <= side < 2**31 for side in size)
            if note.faults or note.empty or note.wrong or not usual:
                odd[number] = note
            parts.append((note.boxes, note.classes, note.area, note.iscrowd))
            if note.outlines is not None:
                outlines = outlines or Outlines()
                for outline in note.outlines:
                    outlines.add(outline)
            counts.append(len(note.boxes))
            ids.append(note.image_id)
            sizes.append(size if usual else (NO_SIZE, NO_SIZE))
        boxes, classes, area, iscrowd = (np.concatenate(column) for column in zip(*parts, strict=True))
        numbers = np.array(ids, np.int64), np.array(sizes, np.int64).reshape(-1, 2)
        places = np.arange(len(boxes) if outlines else 0)
        return cls(np.cumsum(counts), boxes, classes, area, iscrowd, *numbers, odd, outlines, places)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Annotation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Annotation]: ...
    def __getitem__(self, index: int | slice) -> Annotation | list[Annotation]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index in self.odd:
            return self.odd[index]
        part = slice(self.ends[index], self.ends[index + 1])
        width, height = self.sizes[index].tolist()
        size = None if width == NO_SIZE else (width, height)
        numbers = np.arange(self.ends[index + 1] - self.ends[index])
        boxes, classes, area, iscrowd = self.boxes[part], self.classes[part], self.area[part], self.iscrowd[part]
        found = Annotation(numbers, boxes, classes, area, iscrowd, int(self.image_ids[index]), size)
        if self.outlines is None:
            return found
        return replace(found, outlines=tuple(map(self.outlines.given, self.places[part].tolist())))

    def odd_ones(self, indices: Iterable[int]) -> Iterator[tuple[int, Annotation]]:
        """Those among the images `indices` that have a fault or an odd form."""
        return ((index, self.odd[index]) for index in indices if index in self.odd)

    def known(self, indices: Sequence[int]) -> Known:
        """Classes of the single objects in these images, sizes, and the images with boxes that do not fit them."""
        chosen = np.zeros(len(self), bool)
        chosen[np.asarray(indices, np.int64)] = True
        owner = np.repeat(np.arange(len(self)), np.diff(self.ends))
        labels = np.unique(self.classes[chosen[owner] & (self.iscrowd == 0)])
        stated = self.sizes[:, 0] != NO_SIZE
        first, last = self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]
        beyond = (first < -TOLERANCE).any(1) | ((last > self.sizes[owner] + TOLERANCE).any(1) & stated[owner])
        suspect = np.bincount(owner[beyond], minlength=len(self)) > 0
        in_pixels = np.bincount(owner[(last > 1.001).any(1)], minlength=len(self)) > 0  # others may be shares of it
        suspect |= (np.diff(self.ends) > 0) & ~in_pixels
        places = np.flatnonzero(chosen & stated).tolist()
        heights = self.sizes[chosen & stated][:, ::-1].tolist()
        sizes = [((height, width), index) for (height, width), index in zip(heights, places, strict=True)]
        return Known(frozenset(labels.tolist()), np.flatnonzero(chosen & suspect).tolist(), sizes)
