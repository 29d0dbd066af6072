"""What describes a YOLO set: `data.yaml` of Ultralytics and Roboflow, `obj.data` of darknet, `classes.txt`."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cankd_hf.data.common.files import LABELS_LIMIT, not_a_file, read_lines, shown
from cankd_hf.data.layouts.base import Tree
from cankd_hf.errors import InputError

SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
USUAL = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_FILES = ("classes.txt", "obj.names", "names.txt", "labels.txt", "_darknet.labels")


@dataclass
class Description:
    """What a set says of itself.

    Attributes:
        file: the file that says it, by its name in the tree; "" without one.
        names: id -> name of a class; empty if they are not said.
        splits: name as written -> the paths of its images, as written.
        base: the folder of the set as written, before the paths.
        keypoints: how many numbers of key points follow each box.
    """

    file: str = ""
    names: dict[int, str] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)
    base: str = ""
    keypoints: int = 0


def described(tree: Tree, problems: list[str]) -> Description | None:
    """The description of the set at the top of a tree, if it has one; what is wrong with it is added to `problems`."""
    yamls = [name for name in tree.files[""] if name.lower().endswith((".yaml", ".yml"))]
    usual = [name for name in yamls if name.lower() in USUAL]
    found = [name for name in usual or yamls if _is_description(_loaded(tree.path(name), name, strict=name in usual))]
    if len(found) > 1:
        problems.append(f"{tree.root}: expected one description of a YOLO set, got {', '.join(found)}; keep one")
    if found:
        return _of_yaml(_loaded(tree.path(found[0]), found[0], strict=True), found[0], problems)
    darknet = [name for name in tree.files[""] if name.lower().endswith(".data")]
    return next((said for name in darknet if (said := _of_darknet(tree, name)) is not None), None)


def names_beside(tree: Tree, folders: Iterator[str]) -> tuple[dict[int, str], str]:
    """Class names from a list in one of these folders, one a line; and its name, "" without one."""
    for folder in folders:
        if (file := tree.find(*NAME_FILES, folder=folder)) and (names := _listed(tree.path(file))):
            return names, file
    return {}, ""


def _listed(file: Path) -> dict[int, str]:
    lines = [line.strip() for line in read_lines(file)]
    while lines and not lines[-1]:
        lines.pop()
    return dict(enumerate(lines))


def _loaded(file: Path, place: str, strict: bool) -> dict[str, Any]:
    """The content of a yaml file; empty, unless `strict`, for what is no object."""
    import yaml

    problem = not_a_file(file)
    if problem is None and file.stat().st_size > LABELS_LIMIT:
        problem = f"more than {LABELS_LIMIT} bytes"
    content: Any = None
    if problem is None:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
        except RecursionError:
            problem = "one that is nested too deeply"
        except (yaml.YAMLError, ValueError, OSError) as error:
            problem = f"one that does not parse: {' '.join(str(error).split())[:200]}"
    if isinstance(content, dict):
        return content
    if strict:
        raise InputError(f"{place}: expected a yaml file with names, train and val, got {problem or shown(content)}")
    return {}


def _is_description(content: dict[str, Any]) -> bool:
    return bool({"names", "nc"} & content.keys() and {*SPLIT_KEYS, "path"} & content.keys())


def _of_yaml(content: dict[str, Any], file: str, problems: list[str]) -> Description:
    """The description in a yaml file; its faults are added to `problems`."""
    names: dict[int, str] = {}
    given = content.get("names")
    pairs = dict(enumerate(given)) if isinstance(given, list) else given
    if isinstance(pairs, dict) and all(_is_id(key) and _is_name(name) for key, name in pairs.items()):
        names = {int(key): str(name).strip() for key, name in sorted(pairs.items(), key=lambda pair: int(pair[0]))}
    elif given is not None:
        problems.append(f"{file}: names: expected a list of names, or an object of id and name, got {shown(given)}")
    count = content.get("nc")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= 100_000):
        problems.append(f"{file}: nc: expected the number of classes, got {shown(count)}")
    elif count is not None and names and count != len(names):
        problems.append(
            f"{file}: nc: expected {len(names)}, the number of its names, got {count}; correct one of them"
        )
    elif count is not None and given is None:
        names = {number: f"class_{number}" for number in range(count)}
    splits: dict[str, list[str]] = {}
    for key in SPLIT_KEYS:
        value = content.get(key)
        paths = value if isinstance(value, list) else [] if value is None or value == "" else [value]
        if all(isinstance(path, str) and path for path in paths):
            splits |= {key: paths} if paths else {}
        else:
            problems.append(f"{file}: {key}: expected a folder, or a list of folders, got {shown(value)}")
    shape = content.get("kpt_shape")
    numbers = shape if isinstance(shape, list) and all(isinstance(n, int) and 0 < n < 1000 for n in shape) else []
    base = content.get("path")
    return Description(file, names, splits, base if isinstance(base, str) else "", math.prod(numbers or [0]))


def _is_id(key: Any) -> bool:
    return not isinstance(key, bool) and str(key).isascii() and str(key).isdigit() and len(str(key)) < 10


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int | float) and 0 < len(str(value).strip()) <= 256


def _of_darknet(tree: Tree, file: str) -> Description | None:
    """The description in a file of darknet, `key = value`; None for another kind of file."""
    if not_a_file(tree.path(file)) or os.path.getsize(tree.path(file)) > LABELS_LIMIT:
        return None
    try:
        pairs = [line.partition("=") for line in read_lines(tree.path(file))]
    except InputError:
        return None  # binary data, with an ending that is used for much else
    said = {key.strip(): value.strip() for key, sign, value in pairs if sign}
    splits = {key: [said[key]] for key in SPLIT_KEYS if said.get(key)}
    if not splits or "names" not in said:
        return None
    listed = tree.find(said["names"].replace("\\", "/").rpartition("/")[2])
    return Description(file, _listed(tree.path(listed)) if listed else {}, splits)
