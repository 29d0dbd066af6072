"""COCO json: categories, images, and their objects with crowds, gaps in the ids and repeated ids."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cankd_hf.data.common.files import (
    COCO_LIMIT,
    normal_name,
    outside,
    path_problem,
    printable,
    read_json,
    relative_to,
    shortened,
    shown,
)
from cankd_hf.data.common.json_stream import NotPlain, elements
from cankd_hf.data.common.labels import LONGEST
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.detection.coco_entries import ImageEntries, ObjectEntries
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.errors import InputError

AUTO_PATTERNS = ("annotations/instances_{split}.json", "{split}/_annotations.coco.json", "annotations/{split}.json")
FOLDERS = ("{split}", "images/{split}", "images", ".")
REQUIRED_KEYS = {"images": {"id", "file_name"}, "annotations": {"image_id"}, "categories": {"id", "name"}}


@dataclass
class CocoSplit:
    """One json file."""

    rows: Rows  # its images, in the order of the file
    annotations: AnnotationTable  # their objects
    categories: dict[int, str]  # id in the file -> name, in the order of the classes 0..K-1
    warnings: list[str] = field(default_factory=list)  # about the file
    outlines: tuple[ObjectEntries, np.ndarray] | None = None  # all entries, and the image of each by its row, or -1


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


def read_coco(
    root: Path,
    split: str,
    file: Path,
    skip: bool,
    locate: Callable[[Sequence[str]], list[str]] | None = None,
    outlined: bool = False,
    masked: bool = False,
) -> CocoSplit:
    """Read one json file of a split.

    Annotation ids are not used: messages name boxes by their position. Crowds keep their box; of an RLE only the area
    counts. With `skip`, annotations without an image are only a warning. `locate` gives the names in `root` of images
    that are not in one of the usual folders. `outlined` keeps the outlines; `masked` keeps them as the masks that each
    object then needs. Raises InputError for invalid COCO json,
    images outside the data folder `root`, and unusable entries.
    """
    place = relative_to(file, root)
    if linked := outside(root, [file]):
        raise InputError(linked)
    images, objects, found = _entries(file, place, outlined or masked)
    categories = categories_of(found, place, objects)
    classes = {number: index for index, number in enumerate(categories)}
    warnings = _repeated(place, objects)
    base = _image_folder(root, split, images.names)
    if locate is not None and images.names and not os.path.isfile(base / images.names[0]):
        base, images.names = root, locate(images.names)
    given = (images.odd.get(n, {"file_name": name}) for n, name in enumerate(images.names))
    named = (path_problem(f"{place} images[{n}]", "file_name", image) for n, image in enumerate(given))
    problems = [problem for problem in named if problem]
    row_of = {key: row for row, key in enumerate(images.ids)}
    if len(row_of) < len(images.ids):
        problems += [
            f"{place}: expected an image id once, got {shown(key)} {count} times"
            for key, count in Counter(images.ids).items()
            if count > 1
        ]
    rows = objects.rows(row_of)
    if len(strange := np.flatnonzero(rows < 0)):
        text = (
            f"{place}: {len(strange)} annotations belong to no image, first id {shown(objects.own_id(strange[0]))} "
            f"with image_id {shown(objects.image_of(strange[0]))}"
        )
        (warnings if skip else problems).append(text)
    if problems := problems or outside(root, (os.path.join(base, name) for name in images.names)):
        raise InputError(shortened(problems))
    before = f"{relative_to(base, root)}/".removeprefix("./")
    names = [before + normal_name(name) for name in images.names]
    table = objects.table(images, names, rows, classes, masked)
    return CocoSplit(Rows(root, names), table, categories, warnings, (objects, rows) if outlined else None)


def _matching(root: Path, pattern: str) -> dict[str, Path]:
    """Split -> file."""
    before, after = pattern.split("{split}")
    paths = sorted(root.glob(f"{before}*{after}"))
    return {path.relative_to(root).as_posix()[len(before) :].removesuffix(after): path for path in paths}


def _entries(file: Path, place: str, outlined: bool) -> tuple[ImageEntries, ObjectEntries, list[dict[str, Any]]]:
    """Images, annotations and categories of a file, whose entries have what they need.

    They are read one by one, where the file is as usual; else all of it, which says what is wrong.
    """
    if (found := _one_by_one(file, outlined)) is not None:
        return found
    content = _content(file, place)
    images, objects = ImageEntries(), ObjectEntries(outlined)
    for image in content["images"]:
        images.add(image)
    for entry in content["annotations"]:
        objects.add(entry)
    return images, objects, content["categories"]


def _one_by_one(file: Path, outlined: bool) -> tuple[ImageEntries, ObjectEntries, list[dict[str, Any]]] | None:
    """The same without the whole file in memory; None if anything about it is unusual."""
    images, objects, categories = ImageEntries(), ObjectEntries(outlined), list[dict[str, Any]]()
    add = {"images": images.add, "annotations": objects.add, "categories": categories.append}
    ids = {key: sorted(names & {"id", "image_id"}) for key, names in REQUIRED_KEYS.items()}
    try:
        for key, entry in elements(file, REQUIRED_KEYS, COCO_LIMIT):
            if not isinstance(entry, dict) or not REQUIRED_KEYS[key] <= entry.keys() or _odd_ids(entry, ids[key]):
                return None
            add[key](entry)
    except NotPlain:
        return None
    return (images, objects, categories) if images.ids and categories else None


def _odd_ids(entry: dict[str, Any], ids: Sequence[str]) -> bool:
    """Whether an id that an entry needs is neither a number nor a text."""
    return not all(isinstance(entry[name], (int, float, str)) for name in ids)


def _content(file: Path, place: str) -> dict[str, Any]:
    """The parsed file, its three lists checked."""
    content = read_json(file, place, COCO_LIMIT)
    if not isinstance(content, dict):
        raise InputError(f"{place}: expected COCO json, an object with images, annotations and categories")
    content.setdefault("annotations", [])  # the files of test splits have none
    problems: list[str] = []
    for key, needed in REQUIRED_KEYS.items():
        entries, ids = content.get(key), sorted(needed & {"id", "image_id"})
        if not isinstance(entries, list):
            problems.append(f"{place}: expected COCO json with a list of {key}, got the keys {shown(list(content))}")
            continue
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or needed - set(entry):
                wanted = f"{' and '.join(sorted(needed))} in all {key}"
            elif _odd_ids(entry, ids):
                wanted = f"{' and '.join(ids)} of all {key} as a number or text"
            else:
                continue
            problems.append(f"{place}: expected {wanted}, got {shown(entry)} at {number}")
    if problems:
        raise InputError(shortened(problems))
    return content


def categories_of(entries: list[dict[str, Any]], place: str, objects: ObjectEntries | None = None) -> dict[int, str]:
    """Id and name of each category, by ascending id, without the group that Roboflow adds as id 0, where none of the
    `objects` is of it."""
    group = next((entry for entry in entries if entry["id"] == 0 and entry.get("supercategory") == "none"), None)
    others = [entry for entry in entries if entry is not group]
    if group and others and all(entry.get("supercategory") == group["name"] for entry in others):
        entries = others if objects is None or not objects.any_of(0) else entries
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


def _repeated(place: str, objects: ObjectEntries) -> list[str]:
    """A warning about repeated annotation ids, where other tools keep only the last box."""
    repeated = objects.repeated()
    return [
        f"{place}: {len(repeated)} annotation ids are repeated, first {shown(key)} ({count} times); all their boxes "
        "are used here, tools that go by the id keep one of each: renumber them"
        for key, count in repeated[:1]
    ]


def _image_folder(root: Path, split: str, names: Sequence[str]) -> Path:
    """The folder of the first image; the usual one if the image is in none."""
    name = names[0] if names else ""
    bases = [root / folder.format(split=split) for folder in FOLDERS]
    return next((base for base in bases if name and os.path.isfile(base / name)), bases[0])
