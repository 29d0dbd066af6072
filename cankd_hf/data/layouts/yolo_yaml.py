"""What describes a YOLO set: `data.yaml` of Ultralytics and Roboflow, `obj.data` of darknet, `classes.txt`."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cankd_hf.config.plain_yaml import parse_yaml
from cankd_hf.data.common.files import LABELS_LIMIT, not_a_file, outside, read_lines, shown
from cankd_hf.data.layouts.base import Tree, is_image
from cankd_hf.data.layouts.elsewhere import join
from cankd_hf.errors import InputError

SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
USUAL = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
DEEPEST = 2  # folders below the top in which a description is looked for
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

    @property
    def folder(self) -> str:
        """The folder of the file."""
        return self.file.rpartition("/")[0]


def described(tree: Tree, problems: list[str]) -> Description | None:
    """The description of a set, from the folder nearest to the top that has one; what is wrong with it is added to
    `problems`."""
    for depth in range(DEEPEST + 1):
        folders = [folder for folder in tree.files if len(folder.split("/")) * bool(folder) == depth]
        found = [said for folder in folders for said in _described_in(tree, folder, problems)]
        if len(found) > 1:
            listed = ", ".join(said.file for said in found)
            problems.append(f"{tree.root}: expected one description of a YOLO set, got {listed}; name its folder")
        if found:
            return found[0]
    texts = {key: tree.find(f"{key}.txt") for key in SPLIT_KEYS}
    lists = {key: [name] for key, name in texts.items() if name and _lists_images(tree, name)}
    return Description("the lists of images", splits=lists) if lists else None


def _described_in(tree: Tree, folder: str, problems: list[str]) -> list[Description]:
    """The descriptions in a folder."""
    yamls = [name for name in tree.files[folder] if name.lower().endswith((".yaml", ".yml"))]
    usual = [name for name in yamls if name.lower() in USUAL]
    files = [join(folder, name) for name in usual or yamls]
    loaded = {file: _loaded(tree, file, problems if usual else []) for file in files}
    found = [
        _of_yaml(content, file, problems) for file, content in loaded.items() if _is_description(content, bool(usual))
    ]
    darknet = [join(folder, name) for name in tree.files[folder] if name.lower().endswith(".data")]
    return found or [said for file in darknet if (said := _of_darknet(tree, file, problems)) is not None]


def names_beside(tree: Tree, folders: Iterator[str], problems: list[str]) -> tuple[dict[int, str], str]:
    """Class names from a list in one of these folders, one a line; and its name, "" without one."""
    for folder in folders:
        if (file := tree.find(*NAME_FILES, folder=folder)) and (names := _listed(tree, file, problems)):
            return names, file
    return {}, ""


def repeated(names: dict[int, str], source: str) -> list[str]:
    """A problem for each name that several classes have."""
    numbers: dict[str, list[int]] = {}
    for number, name in names.items():
        numbers.setdefault(name, []).append(number)
    return [
        f"{source}: expected a name of its own for each class, got {shown(name)} for {found}; rename them"
        for name, found in numbers.items()
        if len(found) > 1
    ]


def _listed(tree: Tree, file: str, problems: list[str]) -> dict[int, str]:
    """The names in a list; what is wrong with it is added to `problems`."""
    try:
        if links := outside(tree.root, [tree.path(file)]):
            raise InputError(links)
        lines = [line.strip() for line in read_lines(tree.path(file))]
    except InputError as error:
        problems += error.problems
        return {}
    while lines and not lines[-1]:
        lines.pop()
    names = dict(enumerate(lines))
    odd = [number for number, name in names.items() if not _is_name(name)]
    if odd:
        problems.append(
            f"{file} line {odd[0] + 1}: expected a name of up to 256 characters, got {shown(lines[odd[0]])}"
        )
    return names


def _lists_images(tree: Tree, file: str) -> bool:
    """Whether a text file begins with the path of an image."""
    try:
        return is_image(next((line.strip() for line in read_lines(tree.path(file)) if line.strip()), ""))
    except InputError:
        return False


def _loaded(tree: Tree, file: str, problems: list[str]) -> dict[str, Any]:
    """The content of a yaml file; what is wrong with it is added to `problems`."""
    path = tree.path(file)
    try:
        if links := outside(tree.root, [path]):
            raise InputError(links)
        content, _, wrong = parse_yaml("".join(read_lines(path)), file)
    except InputError as error:
        problems += error.problems
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file}: expected names, train and val, got {shown(content)}")
        return {}
    problems += [
        f"{file}: {key}: {said}" for key, said in wrong if key.partition(".")[0] in (*SPLIT_KEYS, "names", "nc")
    ]
    return content


def _is_description(content: dict[str, Any], usual: bool) -> bool:
    """Whether a yaml file names classes and, unless it is called as usual, splits."""
    return bool({"names", "nc"} & content.keys() and (usual or {*SPLIT_KEYS, "path"} & content.keys()))


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


def _of_darknet(tree: Tree, file: str, problems: list[str]) -> Description | None:
    """The description in a file of darknet, `key = value`; None for another kind of file."""
    path = tree.path(file)
    if not_a_file(path) or os.path.getsize(path) > LABELS_LIMIT or outside(tree.root, [path]):
        return None
    try:
        pairs = [line.partition("=") for line in read_lines(path)]
    except InputError:
        return None  # binary data, with an ending that is used for much else
    said = {key.strip(): value.strip() for key, sign, value in pairs if sign}
    splits = {key: [said[key]] for key in SPLIT_KEYS if said.get(key)}
    if not splits or "names" not in said:
        return None
    listed = tree.find(said["names"].replace("\\", "/").rpartition("/")[2], folder=file.rpartition("/")[0])
    return Description(file, _listed(tree, listed, problems) if listed else {}, splits)
