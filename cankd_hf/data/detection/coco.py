"""COCO json: categories, images, and their objects with crowds, gaps in the ids and repeated ids."""

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cankd_hf.data.common.files import (
    COCO_LIMIT,
    outside,
    path_problem,
    printable,
    read_json,
    relative_to,
    shortened,
    shown,
)
from cankd_hf.data.common.folders import Row
from cankd_hf.data.common.labels import LONGEST
from cankd_hf.data.detection.objects import Annotation, read_annotation
from cankd_hf.errors import InputError

AUTO_PATTERNS = ("annotations/instances_{split}.json", "{split}/_annotations.coco.json", "annotations/{split}.json")
FOLDERS = ("{split}", "images/{split}", "images", ".")
REQUIRED_KEYS = {"images": {"id", "file_name"}, "annotations": {"image_id"}, "categories": {"id", "name"}}


@dataclass
class CocoSplit:
    """One json file."""

    rows: list[Row]  # its images, in the order of the file
    annotations: list[Annotation]  # their objects
    categories: dict[int, str]  # id in the file -> name, in the order of the classes 0..K-1
    warnings: list[str] = field(default_factory=list)  # about the file


def coco_files(root: Path, pattern: str) -> dict[str, Path]:
    """Split -> json file of a folder, by a pattern with `{split}` in it; `auto` tries the usual ones. Raises
    InputError for a pattern that is invalid, leaves the folder, or matches no file."""
    if pattern == "auto":
        return next((files for usual in AUTO_PATTERNS if (files := _matching(root, usual))), {})
    problem = path_problem("data", "annotations", {"annotations": pattern})
    if problem or pattern.count("{split}") != 1:
        raise InputError(problem or f"data.annotations: expected a path with {{split}} in it, got {pattern!r}")
    files = _matching(root, pattern)
    if not files:
        raise InputError(f"data.annotations: expected files like {root / pattern}, found none")
    return files


def read_coco(root: Path, split: str, file: Path, skip: bool) -> CocoSplit:
    """Read one json file of a split.

    Annotation ids are not used: messages name boxes by their position. Crowds keep their box; of an RLE only the area
    counts. With `skip`, annotations without an image are only a warning. Raises InputError for invalid COCO json,
    images outside the data folder `root`, and unusable entries.
    """
    place = relative_to(file, root)
    if linked := outside(root, [file]):
        raise InputError(linked)
    content = _content(file, place)
    categories = _categories(content["categories"], place)
    classes = {number: index for index, number in enumerate(categories)}
    entries: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in content["annotations"]:
        entries[entry.get("image_id")].append(entry)
    rows: list[Row] = []
    annotations: list[Annotation] = []
    warnings = _repeated(place, content["annotations"])
    base = _image_folder(root, split, content["images"])
    named = [path_problem(f"{place} images[{n}]", "file_name", image) for n, image in enumerate(content["images"])]
    problems = [problem for problem in named if problem]
    counts = Counter(image.get("id") for image in content["images"])
    problems += [
        f"{place}: expected an image id once, got {shown(key)} {count} times"
        for key, count in counts.items()
        if count > 1
    ]
    strange = [entry for key, value in entries.items() if key not in counts for entry in value]
    if strange:
        text = (
            f"{place}: {len(strange)} annotations belong to no image, first id {shown(strange[0].get('id'))} with "
            f"image_id {shown(strange[0].get('image_id'))}"
        )
        (warnings if skip else problems).append(text)
    if problems := problems or outside(root, [base / image["file_name"] for image in content["images"]]):
        raise InputError(shortened(problems))
    for image in content["images"]:
        path = base / image["file_name"]
        name = relative_to(path, root)
        size = (image["width"], image["height"]) if {"width", "height"} <= set(image) else None
        number = image["id"] if isinstance(image["id"], int) and 0 <= image["id"] < 2**63 else len(rows)
        rows.append(Row(name, path))
        annotations.append(read_annotation(entries[image["id"]], name, classes, "xywh", number, size))
    return CocoSplit(rows, annotations, categories, warnings)


def _matching(root: Path, pattern: str) -> dict[str, Path]:
    """Split -> file."""
    before, after = pattern.split("{split}")
    paths = sorted(root.glob(f"{before}*{after}"))
    return {path.relative_to(root).as_posix()[len(before) :].removesuffix(after): path for path in paths}


def _content(file: Path, place: str) -> dict[str, Any]:
    """The parsed file, its three lists checked."""
    content = read_json(file, place, COCO_LIMIT)
    if not isinstance(content, dict):
        raise InputError(f"{place}: expected COCO json, an object with images, annotations and categories")
    content.setdefault("annotations", [])  # the files of test splits have none
    for key, needed in REQUIRED_KEYS.items():
        entries = content.get(key)
        if not isinstance(entries, list):
            raise InputError(f"{place}: expected COCO json with a list of {key}, got the keys {shown(list(content))}")
        bad = [n for n, entry in enumerate(entries) if not isinstance(entry, dict) or needed - set(entry)]
        if bad:
            wanted = " and ".join(sorted(needed))
            raise InputError(f"{place}: expected {wanted} in all {key}, got {shown(entries[bad[0]])} at {bad[0]}")
        ids = needed & {"id", "image_id"}
        bad = [
            n for n, entry in enumerate(entries) if not all(isinstance(entry[name], int | float | str) for name in ids)
        ]
        if bad:
            wanted = " and ".join(sorted(ids))
            said = f"{shown(entries[bad[0]])} at {bad[0]}"
            raise InputError(f"{place}: expected {wanted} of all {key} as a number or text, got {said}")
    return content


def _categories(entries: list[dict[str, Any]], place: str) -> dict[int, str]:
    """Id and name of each category, by ascending id."""
    found: dict[int, str] = {}
    ids: dict[str, int] = {}
    for entry in entries:
        key, name = entry["id"], entry["name"]
        if isinstance(key, bool) or not re.fullmatch(r"-?[0-9]{1,9}", str(key).removesuffix(".0")):
            raise InputError(f"{place}: expected a whole number as id of each category, got {shown(entry)}")
        if not isinstance(name, str) or not 0 < len(name.strip()) <= LONGEST or not printable(name):
            raise InputError(f"{place}: expected a name as text for each category, got {shown(entry)}")
        number = int(float(key))
        if number in found or name in ids:
            twice = f"id {number}" if number in found else f"name {shown(name)} (ids {ids[name]} and {number})"
            raise InputError(f"{place}: expected categories with an id and a name of their own, got the {twice} twice")
        found[number], ids[name] = name, number
    return dict(sorted(found.items()))


def _repeated(place: str, annotations: list[dict[str, Any]]) -> list[str]:
    """A warning about repeated annotation ids, where other tools keep only the last box."""
    numbers = (entry.get("id") for entry in annotations)
    repeated = Counter(number for number in numbers if isinstance(number, int | float | str))
    repeated = Counter({key: count for key, count in repeated.items() if count > 1})
    return [
        f"{place}: {len(repeated)} annotation ids are repeated, first {shown(key)} ({count} times); all their boxes "
        "are used here, tools that go by the id keep one of each: renumber them"
        for key, count in list(repeated.items())[:1]
    ]


def _image_folder(root: Path, split: str, images: list[dict[str, Any]]) -> Path:
    """The folder of the first image; the usual one if the image is in none."""
    name = images[0]["file_name"] if images and isinstance(images[0]["file_name"], str) else ""
    bases = [root / folder.format(split=split) for folder in FOLDERS]
    return next((base for base in bases if name and os.path.isfile(base / name)), bases[0])
