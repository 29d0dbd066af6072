"""Images and annotations of a COCO json, gathered into arrays while the file is read."""

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from cankd_hf.data.detection.objects import LARGEST, OUTLINE_KEYS, Annotation, read_annotation
from cankd_hf.data.detection.outlines import Outlines
from cankd_hf.data.detection.table import NO_SIZE, AnnotationTable

HUGE = 2**62  # numbers beyond it are kept as they are
ODD_KEYS = {"bboxes", "boxes", "box", "category", "is_crowd"}  # names that an entry may use instead


class ImageEntries:
    """The entries of `images`: names, ids and sizes; what is no usual entry is kept whole."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ids: list[Any] = []
        self.sizes = array("q")
        self.odd: dict[int, dict[str, Any]] = {}  # those without a name, or of an odd size

    def add(self, entry: dict[str, Any]) -> None:
        name, width, height = entry["file_name"], entry.get("width", NO_SIZE), entry.get("height", NO_SIZE)
        plain = type(name) is str and name and type(width) is type(height) is int
        if not plain or not (0 <= width < HUGE and 0 <= height < HUGE or width == height == NO_SIZE):
            self.odd[len(self.ids)] = entry
            width = height = NO_SIZE
        self.names.append(name if isinstance(name, str) else "")
        self.ids.append(entry["id"])
        self.sizes.extend((width, height))

    def size(self, number: int) -> Any:
        """Width and height as they are written, if both are."""
        if number in self.odd:
            entry = self.odd[number]
            return (entry["width"], entry["height"]) if {"width", "height"} <= set(entry) else None
        width, height = self.sizes[2 * number : 2 * number + 2]
        return None if width == NO_SIZE else (width, height)

    def number(self, place: int) -> int:
        """The id of an image as a number; its place in the file for ids that are none."""
        key = self.ids[place]
        return key if isinstance(key, int) and 0 <= key < 2**63 else place


class ObjectEntries:
    """The entries of `annotations` as columns; what is no usual entry is kept whole. Outlines are kept if wanted."""

    def __init__(self, outlined: bool = False) -> None:
        self.outlines = Outlines() if outlined else None
        self.images, self.kinds, self.crowds, self.ids = array("q"), array("q"), array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")
        self.odd: dict[int, dict[str, Any]] = {}
        self.odd_ids: dict[int, Any] = {}  # place -> an id that is missing, or no usual number

    def add(self, entry: dict[str, Any]) -> None:
        image: Any = entry["image_id"]
        kind: Any = entry.get("category_id")
        if type(kind) is str and kind.isascii() and kind.isdigit() and len(kind) < 10:  # as ids of categories may be
            kind = int(kind)
            entry = {**entry, "category_id": kind}
        box: Any = entry.get("bbox")
        area: Any = entry.get("area")
        crowd, own = entry.get("iscrowd", 0), entry.get("id")
        place = len(self.images)
        if self.outlines is not None:
            self.outlines.add(entry.get("segmentation"))
        if type(own) is not int or not -HUGE < own < HUGE:
            self.odd_ids[place], own = own, 0
        self.ids.append(own)
        try:
            left, top, width, height = box
            plain = (
                type(box) is list
                and type(image) is type(kind) is type(crowd) is int
                and 0 <= crowd <= 1
                and -HUGE < image < HUGE
                and -HUGE < kind < HUGE
                and {type(left), type(top), type(width), type(height)} <= {int, float}
                and (-LARGEST < left < LARGEST and -LARGEST < top < LARGEST)
                and (0 < width < LARGEST and 0 < height < LARGEST)
                and ODD_KEYS.isdisjoint(entry)
            )
        except (ValueError, TypeError):  # no four values
            plain = False
        if not plain:
            self.odd[place] = entry
            image = kind = crowd = 0
            left, top, width, height, area = 0, 0, 1, 1, None
        self.images.append(image)
        self.kinds.append(kind)
        self.crowds.append(crowd)
        self.boxes.extend((left, top, width, height))
        usual = (type(area) is float or type(area) is int) and 0 < area < LARGEST**2
        self.areas.append(area if usual else math.nan if self.outlines is not None else width * height)

    def any_of(self, kind: int) -> bool:
        """Whether an entry is of a category."""
        usual = np.asarray(self.kinds) == kind
        usual[list(self.odd)] = False
        return bool(usual.any()) or any(entry.get("category_id") == kind for entry in self.odd.values())

    def kind(self, place: int) -> Any:
        """The category of an entry, as it is written."""
        return self.odd[place].get("category_id") if place in self.odd else self.kinds[place]

    def own_id(self, place: int) -> Any:
        return self.odd_ids[place] if place in self.odd_ids else self.ids[place]

    def image_of(self, place: int) -> Any:
        return self.odd[place]["image_id"] if place in self.odd else self.images[place]

    def repeated(self) -> list[tuple[Any, int]]:
        """The ids that several entries have, in the order of the file, and how many."""
        if self.odd_ids:
            numbers = (self.own_id(place) for place in range(len(self.ids)))
            counts = Counter(number for number in numbers if isinstance(number, int | float | str))
            return [(key, count) for key, count in counts.items() if count > 1]
        found, first, number = np.unique(np.asarray(self.ids), return_index=True, return_counts=True)
        twice = np.flatnonzero(number > 1)
        twice = twice[np.argsort(first[twice])]
        return [(int(found[place]), int(number[place])) for place in twice]

    def rows(self, row_of: Mapping[Any, int]) -> np.ndarray:
        """The image of each entry by its row, -1 for none: [N]."""
        found, inverse = np.unique(np.asarray(self.images), return_inverse=True)
        rows = np.array([row_of.get(key, -1) for key in found.tolist()], np.int64)[inverse.reshape(-1)]
        for place, entry in self.odd.items():
            rows[place] = row_of.get(entry["image_id"], -1)
        return rows

    def table(
        self,
        images: ImageEntries,
        names: list[str],
        rows: np.ndarray,
        classes: Mapping[int, int],
        masked: bool = False,
    ) -> AnnotationTable:
        """The entries by image; an image with one that is odd, or of an unknown category, is read with all its faults.

        Args:
            images: the images.
            names: their names in messages.
            rows: the image of each entry, from `rows`.
            classes: id of a category in the file -> class.
            masked: whether the objects need an outline.
        """
        kinds, inverse = np.unique(np.asarray(self.kinds), return_inverse=True)
        labels = np.array([classes.get(kind, -1) for kind in kinds.tolist()], np.int64)[inverse.reshape(-1)]
        good = labels >= 0
        good[list(self.odd)] = False
        if masked and self.outlines is not None:
            good &= [self.outlines.usable(place) for place in range(len(good))]
        strange = [number for number in images.odd if images.size(number) is not None]
        troubled = {*rows[~good & (rows >= 0)].tolist(), *strange}
        order = np.argsort(rows, kind="stable")
        order = order[rows[order] >= 0]
        ends = np.searchsorted(rows[order], np.arange(len(names) + 1))
        odd = {
            row: self._read(row, order[ends[row] : ends[row + 1]].tolist(), images, names[row], classes, masked)
            for row in sorted(troubled)
        }
        order = order[good[order]]
        return AnnotationTable(
            np.searchsorted(rows[order], np.arange(len(names) + 1)),
            np.asarray(self.boxes).reshape(-1, 4)[order],
            labels[order],
            np.asarray(self.areas)[order],
            np.asarray(self.crowds)[order],
            np.array([images.number(place) for place in range(len(names))], np.int64),
            np.array(images.sizes, np.int64).reshape(-1, 2),
            odd,
            self.outlines if masked else None,
            order,
        )

    def _read(
        self, row: int, places: list[int], images: ImageEntries, name: str, classes: Mapping[int, int], masked: bool
    ) -> Annotation:
        """The objects of one image, entry by entry."""
        entries = [self.odd.get(place) or self._entry(place) for place in places]
        return read_annotation(entries, name, classes, "xywh", images.number(row), images.size(row), masked)

    def _entry(self, place: int) -> dict[str, Any]:
        box = list(self.boxes[4 * place : 4 * place + 4])
        crowd, area = self.crowds[place], self.areas[place]
        entry = {"bbox": box, "category_id": self.kinds[place], "area": area, "iscrowd": crowd}
        return entry if self.outlines is None else {**entry, OUTLINE_KEYS[0]: self.outlines.given(place)}
