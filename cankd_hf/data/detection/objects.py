"""Boxes of objects: read from annotations of several forms, and checked one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cankd_hf.data.common.files import shown
from cankd_hf.data.common.targets import Summary
from cankd_hf.data.detection.outlines import box_around, outline_problem, run_lengths
from cankd_hf.errors import InputError
from cankd_hf.run_lengths import decoded

BOX_KEYS = ("bbox", "bboxes", "boxes", "box")
CATEGORY_KEYS = ("category", "category_id", "categories", "label", "labels", "class")
CROWD_KEYS = ("iscrowd", "is_crowd")
OUTLINE_KEYS = ("segmentation", "segmentations")
BOX_FORMATS = {"xywh": "[x, y, width, height]", "xyxy": "[x0, y0, x1, y1]"}
TOLERANCE = 2.0  # pixels that label tools are off by at the border
NO_AREA = "no area"  # in what is told of a box or mask without area
LARGEST = 1e9  # pixels; beyond it coordinates and areas are no longer exact
Categories = Mapping[Any, int]


@dataclass(frozen=True)
class Objects:
    """The objects of one image, in its own pixels, upright."""

    boxes: torch.Tensor  # float32 [n, 4], x0, y0, x1, y1
    classes: torch.Tensor  # int64 [n], 0..K-1
    area: torch.Tensor  # float32 [n]: that of the outline if known, else of the box
    iscrowd: torch.Tensor  # int64 [n]: 1 for a region of many objects that is left out of losses and scores
    image_id: int  # number of the image; below 0: it replaces another image and does not count in scores
    dropped: tuple[str, ...] = ()  # boxes that cannot be used, and why
    empty: tuple[str, ...] = ()  # boxes without area
    warnings: tuple[str, ...] = ()  # notes about the boxes
    looks_xyxy: bool = False  # the boxes leave the image, and would not as [x0, y0, x1, y1]
    outlines: tuple[bytes, ...] | None = None  # COCO's compressed run lengths of each object, where masks are read
    size: tuple[int, int] = (0, 0)  # height and width of the image, where masks are read

    def masks(self) -> torch.Tensor:
        """The pixels of the objects, uint8 [n, height, width]."""
        return torch.from_numpy(decoded(self.outlines or (), *self.size)).to(torch.uint8)

    @property
    def value(self) -> Objects:
        """What transforms get: itself."""
        return self

    def standing_in(self) -> Objects:
        """The same, marked not to count."""
        return replace(self, image_id=-1)

    def summary(self) -> Summary:
        """The input of the checks; a set with mostly corner boxes is refused."""
        return Summary(
            frozenset(self.classes[self.iscrowd == 0].tolist()),
            dropped=self.dropped,
            empty=self.empty,
            warnings=self.warnings,
            doubtful=self.looks_xyxy,
            counted=len(self.boxes) > 0,
            review=_refuse_corners,
        )


def _refuse_corners(corners: Sequence[str], counted: int, class_names: dict[int, str]) -> list[str]:
    if counted >= 4 and 2 * len(corners) > counted:
        raise InputError(
            f"data: expected boxes [x, y, width, height], got boxes that look like [x0, y0, x1, y1] in {len(corners)} "
            f"of {counted} images that were checked, first {corners[0]}; set data.box_format=xyxy"
        )
    return []


@dataclass(frozen=True)
class Annotation:
    """The objects of one image as annotated, checked as far as possible without its pixels."""

    numbers: np.ndarray  # int64 [n], positions in the annotated list, for messages
    boxes: np.ndarray  # float64 [n, 4], x, y, width, height
    classes: np.ndarray  # int64 [n]
    area: np.ndarray  # float64 [n]
    iscrowd: np.ndarray  # int64 [n]
    image_id: int  # number of the image
    size: tuple[int, int] | None = None  # (width, height) in the metadata, if any
    faults: tuple[str, ...] = ()  # boxes that cannot be used
    empty: tuple[str, ...] = ()  # boxes without area
    wrong: tuple[str, ...] = ()  # unknown categories: a fault of the whole set
    outlines: tuple[Any, ...] | None = None  # the `segmentation` of each object, where masks are read


def read_annotation(
    value: Any,
    name: str,
    categories: Categories,
    box_format: str = "xywh",
    image_id: int = 0,
    size: tuple[int, int] | None = None,
    masked: bool = False,
) -> Annotation:
    """Read the objects of one image, with their outlines if `masked`, in which case boxes may be left out.

    `value` is a dict of lists (`bbox`, `category` and, optionally, `area`, `iscrowd`), a list of dicts with the same
    keys, or None for no objects. `categories` maps ids and names to classes 0..K-1; `box_format` is `xywh` or `xyxy`,
    in pixels; `size` is the (width, height) in the metadata; `name` is for messages.
    """
    if not masked and (columns := _plain_columns(value, categories, box_format)) is not None:
        return Annotation(np.arange(len(columns[0])), *columns, image_id, size)
    rows: list[tuple[int, list[float], int, float, int, Any]] = []
    faults: list[str] = []
    empty: list[str] = []
    wrong: list[str] = []
    entries = _entries(value, masked)
    if isinstance(entries, str):
        faults, entries = [f"{name}: {entries}"], []
    for number, entry in enumerate(entries):
        place = f"{name} box {number}"
        box, outline, problems = _shape_of(entry, masked, place, box_format)
        faults += problems
        written = _first(entry, CATEGORY_KEYS)
        named = isinstance(written, int | str | float | np.integer) and not isinstance(written, bool)
        label = categories.get(written) if named else None
        if label is None:
            wrong.append(f"{place}: expected a category out of {_listed(categories)}, got {shown(written)}")
        crowd = _first(entry, CROWD_KEYS)
        if crowd not in (None, 0, 1):
            faults.append(f"{place}: expected iscrowd of 0 or 1, got {shown(crowd)}")
        if problems or label is None or crowd not in (None, 0, 1):
            continue
        if 0 in box[2:]:
            empty.append(f"{place} {_shown(box)}: {NO_AREA}, {box[2]:g} x {box[3]:g} pixels")
            continue
        area = _number(entry.get("area"))
        area = area if 0 < area < LARGEST**2 else math.nan if masked else box[2] * box[3]
        rows.append((number, box, label, area, int(bool(crowd)), outline))
    numbers, boxes, classes, areas, crowds, outlines = zip(*rows, strict=True) if rows else ((),) * 6
    return Annotation(
        np.array(numbers, dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(classes, dtype=np.int64),
        np.array(areas, dtype=np.float64),
        np.array(crowds, dtype=np.int64),
        image_id,
        size,
        tuple(faults),
        tuple(empty),
        tuple(wrong),
        tuple(outlines) if masked else None,
    )


def _plain_columns(
    value: Any, categories: Categories, box_format: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Boxes, classes, areas and crowds of lists without any fault, at once; None for all others, read one by one."""
    if not isinstance(value, dict) or not value.keys() <= {"bbox", "category", "area", "iscrowd"}:
        return None
    given: Any = value.get("bbox")
    kinds: Any = value.get("category")
    count = len(given) if type(given) is list and given else -1
    areas, crowds = (value.get(key, [0] * count) for key in ("area", "iscrowd"))
    if any(type(column) is not list or len(column) != count for column in (kinds, areas, crowds)):
        return None
    numbers = {type(number) for box in given for number in box} if all(type(box) is list for box in given) else {None}
    if not numbers <= {int, float} or not {*map(type, areas)} <= {int, float} or {*map(type, crowds)} != {int}:
        return None
    if any(len(box) != 4 for box in given) or not {*map(type, kinds)} <= {int, str} or not {*crowds} <= {0, 1}:
        return None
    labels = [categories.get(kind, -1) for kind in kinds]
    if min(labels) < 0 or max(abs(number) for box in given for number in box) >= LARGEST or max(areas) >= LARGEST:
        return None
    boxes = np.array(given, dtype=np.float64)
    if box_format == "xyxy":
        boxes[:, 2:] -= boxes[:, :2]
    if not (boxes[:, 2:] > 0).all() or not np.isfinite(boxes).all():
        return None
    stated = np.array(areas, dtype=np.float64)
    area = np.where(stated > 0, stated, boxes[:, 2] * boxes[:, 3])
    return boxes, np.array(labels, dtype=np.int64), area, np.array(crowds, dtype=np.int64)


def fit_to_image(annotation: Annotation, height: int, width: int, name: str) -> Objects:
    """Check the boxes against the size of the decoded, upright image, and clip those that reach over its border.

    Unusable boxes are listed in `dropped`, those without area in `empty`, oddities in `warnings`. Nothing is raised.
    """
    boxes, dropped, empty = annotation.boxes, list(annotation.faults), list(annotation.empty)
    wrong_size = size_problem(annotation, height, width, name)
    warnings = [wrong_size] if wrong_size else []
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    limits = np.array([width, height, width, height], dtype=np.float64)
    cut = corners.clip(0, limits)
    over = np.abs(cut - corners).max(axis=1, initial=0)
    inside = ((cut[:, 2:] - cut[:, :2]) > 1e-3).all(axis=1)
    relative = len(boxes) > 0 and corners.max() <= 1.001 and min(width, height) > 4
    for place in range(len(boxes)):
        what = f"{name} box {annotation.numbers[place]} {_shown(boxes[place])}"
        if relative:
            dropped.append(
                f"{what}: expected pixels of an image of {width} x {height}, got values of 1 at most: shares of the "
                "image? multiply x and width by its width, y and height by its height"
            )
        elif not inside[place] and over[place] <= TOLERANCE:
            empty.append(f"{what}: {NO_AREA} in the image of {width} x {height}")
        elif not inside[place]:
            dropped.append(f"{what}: expected a box in the image of {width} x {height}, got one outside")
        elif over[place] > TOLERANCE:
            beyond = f"{over[place]:g} pixels beyond the image of {width} x {height}"
            warnings.append(f"{what} reaches {beyond}; it is cut")
    outlines, areas = _outlined(annotation, height, width, name, (dropped, empty, warnings))
    keep = inside & (not relative) & (areas > 0)
    shrunk = (cut[:, 2:] - cut[:, :2]).prod(axis=1)
    stated = np.where(np.isnan(annotation.area), areas, annotation.area)
    area = np.where(over > 0, np.minimum(stated, shrunk), stated)
    within = (boxes >= -TOLERANCE).all() and (boxes <= limits + TOLERANCE).all()
    ordered = (boxes[:, 2:] > boxes[:, :2]).all() and within
    looks_xyxy = bool(ordered and over.max(initial=0) > TOLERANCE)  # as x, y, width, height they leave the image
    if looks_xyxy:
        warnings.append(
            f"{name}: its {len(boxes)} boxes (box {annotation.numbers[0]} ...) all fit as [x0, y0, x1, y1], "
            "but not as [x, y, width, height]; if they are corners, convert them or set data.box_format=xyxy"
        )
    return Objects(
        torch.from_numpy(cut[keep]).float(),
        torch.from_numpy(annotation.classes[keep]),
        torch.from_numpy(area[keep]).float(),
        torch.from_numpy(annotation.iscrowd[keep]),
        annotation.image_id,
        tuple(dropped),
        tuple(empty),
        tuple(warnings),
        looks_xyxy,
        None if annotation.outlines is None else tuple(one for one, kept in zip(outlines, keep, strict=True) if kept),
        (height, width),
    )


def _outlined(
    annotation: Annotation, height: int, width: int, name: str, told: tuple[list[str], list[str], list[str]]
) -> tuple[list[bytes], np.ndarray]:
    """Run lengths and pixels [n] of the masks of an annotation; without masks nothing is encoded, and all count as 1.

    In `told` a mask that cannot be used, with 0 pixels, comes to the first list, one without a pixel to the second,
    and one that does not lie in its box to the third.
    """
    from faster_coco_eval.core import mask

    dropped, empty, warnings = told
    areas = np.ones(len(annotation.boxes))
    found = [b""] * len(areas)
    for place, outline in enumerate(annotation.outlines or ()):
        what = f"{name} mask {annotation.numbers[place]}"
        try:
            found[place] = run_lengths(outline, height, width)
        except ValueError as error:
            areas[place] = 0
            dropped.append(f"{what}: {error}; correct or drop it")
            continue
        lengths = {"size": [height, width], "counts": found[place]}
        areas[place] = mask.area(lengths)
        if not areas[place]:
            empty.append(f"{what}: {NO_AREA} in the image of {width} x {height}")
        elif _apart(mask.toBbox(lengths), annotation.boxes[place]):
            seen = _shown(mask.toBbox(lengths))
            warnings.append(f"{what}: it covers {seen}, far from its box {_shown(annotation.boxes[place])}")
    return found, areas


def _apart(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two boxes x, y, width, height overlap by less than a tenth of both together."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[:2] + one[2:], other[:2] + other[2:])
    both = (high - low).clip(min=0).prod()
    return bool(both < 0.1 * (one[2:].prod() + other[2:].prod() - both))


def size_problem(annotation: Annotation, height: int, width: int, name: str) -> str | None:
    """The problem, if the metadata and the file differ in size."""
    if annotation.size is None or annotation.size == (width, height):
        return None
    stated = f"{shown(annotation.size[0])} x {shown(annotation.size[1])}"
    turned = " (it is turned by its EXIF orientation)" if annotation.size == (height, width) else ""
    return (
        f"{name}: the metadata say {stated}, the file is {width} x {height}{turned}; boxes are taken as pixels of "
        "the file: scale them, or correct width and height"
    )


def _shape_of(entry: dict[str, Any], masked: bool, place: str, box_format: str) -> tuple[list[float], Any, list[str]]:
    """The box x, y, width, height of an object, its outline, and what is wrong with them; if `masked`, an outline is
    needed, and a box that is left out is the one around it."""
    given, outline = _first(entry, BOX_KEYS), _first(entry, OUTLINE_KEYS)
    problem = outline_problem(outline) if masked else None
    if given is not None or not masked:
        box = _read_box(given, place, box_format)
    elif problem is None:
        try:
            return box_around(outline), outline, []
        except ValueError as error:
            return [], outline, [f"{place}: {error}"]
    else:
        box = []
    problems = [box] if isinstance(box, str) else []
    return [] if isinstance(box, str) else box, outline, problems + ([f"{place}: {problem}"] if problem else [])


def _entries(value: Any, masked: bool = False) -> list[dict[str, Any]] | str:
    """One dict an object, or the problem."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return value
    if not isinstance(value, dict):
        return f"expected objects like {{'bbox': [[x, y, w, h], ...], 'category': [0, ...]}}, got {shown(value)}"
    lists = {key: list(column) for key, column in value.items() if isinstance(column, list | tuple | np.ndarray)}
    boxes, labels = (next((lists[key] for key in keys if key in lists), None) for keys in (BOX_KEYS, CATEGORY_KEYS))
    if masked and boxes is None:
        boxes = next((lists[key] for key in OUTLINE_KEYS if key in lists), None)
    if boxes is None or labels is None:
        return f"expected objects with `bbox` and `category`, got the keys {shown(list(value))}"
    if len(boxes) != len(labels):
        return f"expected a category for each box, got {len(boxes)} boxes and {len(labels)} categories"
    for key in ("area", *CROWD_KEYS):
        if value.get(key) is not None and len(lists.get(key, ())) != len(boxes):
            return (
                f"expected `{key}` to be a list with one value for each of {len(boxes)} boxes, got {shown(value[key])}"
            )
    lists = {key: column for key, column in lists.items() if len(column) == len(boxes)}
    return [dict(zip(lists, entry, strict=True)) for entry in zip(*lists.values(), strict=True)]


def _read_box(value: Any, place: str, box_format: str) -> list[float] | str:
    """x, y, width, height; or the problem."""
    expected = f"expected {BOX_FORMATS[box_format]} in pixels"
    numbers = list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else None
    if numbers is None or len(numbers) != 4:
        count = "" if numbers is None else f"{len(numbers)} numbers: "
        return f"{place}: {expected}, got {count}{shown(value)}"
    values = [_number(number) for number in numbers]
    if not all(abs(number) < LARGEST for number in values):
        return f"{place}: {expected}, got {shown(value)}; drop the box, or give it numbers"
    if box_format == "xyxy":
        values[2:] = [values[2] - values[0], values[3] - values[1]]
    if values[2] < 0 or values[3] < 0:
        size = f"{values[2]:g} x {values[3]:g}"
        written = _shown([_number(number) for number in numbers])
        return f"{place} {written}: expected a width and a height above 0, got {size}; drop or correct the box"
    return values


def _number(value: Any) -> float:
    """A number, or nan."""
    if not isinstance(value, int | float | np.number) or isinstance(value, bool):
        return math.nan
    return float(value) if abs(float(value) if isinstance(value, np.number) else value) < LARGEST**2 else math.nan


def _first(entry: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if key in entry), None)


def _listed(categories: Categories) -> str:
    keys = [repr(key) for key in categories]
    return ", ".join(keys) if len(keys) <= 8 else f"{', '.join(keys[:3])}, ... {keys[-1]}"


def _shown(values: Sequence[float] | np.ndarray) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"
