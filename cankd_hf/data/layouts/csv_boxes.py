"""Tables of boxes as TensorFlow's tutorials and Roboflow write them: one line an object, with its image's name."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from cankd_hf.data.common.files import read_lines, shortened, shown
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.detection.objects import Annotation, read_annotation
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, ordered
from cankd_hf.data.layouts.elsewhere import ByName, file_name, file_split, join, same
from cankd_hf.errors import InputError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
IMAGES = ("filename", "file_name", "image", "image_path")
CLASSES = ("class", "label", "class_name", "name")


@dataclass
class _Image:
    """What a table says of one image."""

    boxes: list[list[float]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    faults: list[str] = field(default_factory=list)


class CsvBoxes:
    """The columns filename, class, xmin, ymin, xmax, ymax; width and height are compared with the images, if given."""

    name = "csv table of boxes"

    def find(self, tree: Tree, need: str | None) -> Found | None:
        if need == "masks":
            return None
        files = [join(folder, name) for folder, names in tree.files.items() for name in names if _is_csv(name)]
        files = [file for file in files if _columns(tree, file)]
        if not files:
            return None
        problems, notes = tree.refuse_links(files), list[str]()
        images, parts = ByName(tree, file_name), dict[str, dict[str, _Image]]()
        for file in files if not problems else ():
            split = file_split(file) or "train"
            if split in parts:
                problems.append(f"{tree.root}: expected one table of boxes for {split}, got {file} too; keep one")
                continue
            parts[split] = _read(tree, file, split, images, problems)
            folder = file.rpartition("/")[0]
            for name in tree.images.get(folder, ()):  # an image without an object has no line
                parts[split].setdefault(join(folder, name), _Image())
        problems += tree.refuse_links([name for part in parts.values() for name in part])
        if problems:  # with what reading the splits would tell
            problems += [text for part in parts.values() for image in part.values() for text in image.faults]
            raise InputError(shortened(problems))
        used = {name for part in parts.values() for name in part}
        if left := [name for names in images.known.values() for name in names if name not in used]:
            notes.append(f"{len(left)} images are in no table and are not used, first {left[0]}")
        found = {name for part in parts.values() for image in part.values() for name in image.classes}
        names = sorted(found, key=lambda name: (same(name), name))
        classes = {name: index for index, name in enumerate(names)}
        splits = {name: Split(len(part), partial(_content, tree, part, classes)) for name, part in parts.items()}
        labels = Labels(dict(enumerate(names)))
        return Found(self.name, ("boxes", "images"), tree.root, ordered(splits), labels, notes, files[0])


def _content(tree: Tree, part: Mapping[str, _Image], classes: Mapping[str, int]) -> Content:
    bare = [number for number, image in enumerate(part.values()) if not image.boxes and not image.faults]
    notes = [f"{len(bare)} of {len(part)} images are in no line of the table; they have no box"] if bare else []
    return Content(Rows(tree.root, part), AnnotationTable.of(_annotations(part, classes)), bare=bare, notes=notes)


def _annotations(part: Mapping[str, _Image], classes: Mapping[str, int]) -> Iterator[Annotation]:
    for number, (name, image) in enumerate(part.items()):
        objects = {"bbox": image.boxes, "category": image.classes}
        read = read_annotation(objects, name, classes, "xyxy", number, image.size)
        yield replace(read, faults=(*image.faults, *read.faults)) if image.faults else read


def _read(tree: Tree, file: str, split: str, images: ByName, problems: list[str]) -> dict[str, _Image]:
    """The images in a table, by their names in the tree."""
    columns = _columns(tree, file)
    part: dict[str, _Image] = {}
    absent: dict[str, int] = {}
    try:
        for number, line in enumerate(csv.reader(read_lines(tree.path(file))), start=1):
            if number == 1 or not any(word.strip() for word in line):
                continue
            values = dict(zip(columns, [word.strip() for word in line], strict=False))
            written, name = values.get("image", ""), values.get("class", "")
            found = images.find(written, file.rpartition("/")[0], split) if written else None
            if found is None:
                absent.setdefault(written, number)
                continue
            image = part.setdefault(found, _Image())
            try:
                corners = [float(values[key]) for key in CORNERS]
            except (KeyError, ValueError):
                corners = [math.nan]
            if not name or not all(map(math.isfinite, corners)) or min(np.subtract(corners[2:], corners[:2])) < 0:
                wanted = f"a class and numbers as {', '.join(CORNERS)}, the first two the smaller"
                image.faults.append(f"{file} line {number}: expected {wanted}, got {shown(','.join(line))}")
                continue
            image.boxes.append(corners)
            image.classes.append(name)
            size = [values.get(key, "") for key in ("width", "height")]
            if all(text.isascii() and text.isdigit() and 0 < len(text) < 10 for text in size):
                image.size = int(size[0]), int(size[1])
    except csv.Error as error:
        problems.append(f"{file}: expected a csv file, got one that does not parse: {error}")
    problems += [f"{file} line {n}: expected an image in {tree.root}, got {name!r}" for name, n in absent.items()]
    return part


def _columns(tree: Tree, file: str) -> Sequence[str]:
    """The columns of a table, those of the image and of the class by these names; empty if it is none of boxes."""
    try:
        header = next(csv.reader(read_lines(tree.path(file))), [])
    except (InputError, csv.Error):
        return []
    columns = [word.strip().lower() for word in header]
    image = next((name for name in IMAGES if name in columns), None)
    label = next((name for name in CLASSES if name in columns), None)
    if image is None or label is None or not {*CORNERS} <= {*columns}:
        return []
    return ["image" if name == image else "class" if name == label else name for name in columns]


def _is_csv(name: str) -> bool:
    return name.lower().endswith(".csv")
