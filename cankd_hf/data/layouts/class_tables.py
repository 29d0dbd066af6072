"""Tables of classes that tools write beside masks: CVAT's labelmap.txt, class_dict.csv, Roboflow's _classes.csv, lists
of names."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cankd_hf.data.common.files import outside, read_lines, relative_to, shortened, shown
from cankd_hf.data.common.labels import LONGEST, NO_CLASS, Labels, colour_code
from cankd_hf.data.layouts.base import Tree
from cankd_hf.errors import InputError, together

VOID = re.compile(r"(void|ignored?|unlabell?ed|undefined|don'?t[ _-]?care)", re.IGNORECASE)
CLASSES = 1024  # a longer table is another kind of file


class Entry(NamedTuple):
    """One class of a table."""

    name: str
    value: int | None = None  # in the masks; None: its place in the table
    colour: tuple[int, int, int] | None = None


def read_table(tree: Tree) -> tuple[Labels | None, str]:
    """The classes of the first table at the top of a set, or in one of its folders, and the name of its file.

    Raises InputError with all lines of a table that do not parse.
    """
    folders = sorted(tree.files, key=lambda folder: (folder.count("/") + bool(folder), folder))
    for names, reader in TABLES:
        for folder in folders:
            if (found := tree.find(*names, folder=folder)) is None:
                continue
            path = tree.path(found)
            if problems := outside(tree.root, [path]):
                raise InputError(problems)
            try:
                entries: list[Entry] = together(*reader(path))
            except InputError as error:
                raise InputError(shortened(error.problems)) from None
            if not 0 < len(entries) <= CLASSES:
                raise InputError(f"{path}: expected a class a line, got {len(entries)}")
            return labels_of(entries, relative_to(path, tree.root)), found
    return None, ""


def labels_of(entries: Sequence[Entry], place: str) -> Labels:
    """The classes in their order; what is called void has none. Raises InputError for names or colours that are there
    twice, or values that are."""
    values = [entry.value if entry.value is not None else number for number, entry in enumerate(entries)]
    columns: dict[str, list[object]] = {
        "name": [entry.name for entry in entries if not VOID.fullmatch(entry.name)],
        "colour": [entry.colour for entry in entries if entry.colour is not None],
        "value": [*values],
    }
    for what, given in columns.items():
        if twice := [one for one in given if given.count(one) > 1]:
            raise InputError(f"{place}: expected a {what} of its own for each class, got {shown(twice[0])} twice")
    labels = Labels()
    for value, entry in zip(values, entries, strict=True):
        label = NO_CLASS if VOID.fullmatch(entry.name) else len(labels.id2label)
        if label != NO_CLASS:
            labels.id2label[label] = entry.name
        labels.values[value] = label
        if entry.colour is not None:
            labels.codes[colour_code(entry.colour)] = label
            labels.palette |= {label: entry.colour} if label != NO_CLASS else {}
    if all(value == label for value, label in labels.values.items()):
        labels.values = {}
    elif labels.ignore_index not in labels.values:
        labels.values[labels.ignore_index] = NO_CLASS
    return labels


# Each of these gives what reads a class, so that all lines that do not parse are told.


def _labelmap(path: Path) -> Iterator[Callable[[], Entry]]:
    """CVAT: `# label:color_rgb:parts:actions`, then `road:128,64,128::`."""
    for place, line in _lines(path):
        name, _, rest = line.partition(":")
        yield partial(_coloured, name, rest.split(":")[0].split(","), place)


def _coloured(name: str, colour: Sequence[str], place: str) -> Entry:
    return Entry(_name(name, place), colour=_colour(colour, place))


def _colour_list(path: Path) -> Iterator[Callable[[], Entry]]:
    """`64 128 64  Animal`, as CamVid has it, or `Animal 64 128 64`."""
    for place, line in _lines(path):
        yield partial(_listed, line, place)


def _listed(line: str, place: str) -> Entry:
    found = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(.+)", line)
    other = re.fullmatch(r"(.+?)[\s,]+(\d+)[\s,]+(\d+)[\s,]+(\d+)", line)
    parts = found.groups() if found else other.groups()[1:] + other.groups()[:1] if other else None
    if parts is None:
        raise InputError(f"{place}: expected `red green blue name`, got {shown(line)}")
    return _coloured(parts[3], parts[:3], place)


def _csv(path: Path) -> Iterator[Callable[[], Entry]]:
    """A table with a column for the name, and the value or the colour: `name,r,g,b`, `Pixel Value, Class`."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(read_lines(path)) if any(map(str.strip, row))]
    head = [re.sub(r"[^a-z]", "", cell.lower()) for cell in rows[0]] if rows else []
    place_of = {key: head.index(key) for key in head}
    name = next((place_of[key] for key in ("name", "class", "classname", "label", "classes") if key in place_of), None)
    value = next((place_of[key] for key in ("pixelvalue", "value", "id", "index", "classid") if key in place_of), None)
    channels = [
        next((place_of[key] for key in (colour, colour[0]) if key in place_of), None)
        for colour in ("red", "green", "blue")
    ]
    if name is None:
        raise InputError(f"{path}: expected a column `name` or `class` beside its value or r, g, b, got {shown(head)}")
    where = name, value, [one for one in channels if one is not None] if None not in channels else None
    for number, row in enumerate(rows[1:], start=2):
        yield partial(_row, row, len(head), where, f"{path} line {number}")


def _row(cells: Sequence[str], count: int, where: tuple[int, int | None, list[int] | None], place: str) -> Entry:
    """A row of a table; `where` are the columns of name, value and colour."""
    name, value, channels = where
    if len(cells) < count:
        raise InputError(f"{place}: expected {count} values, got {shown(cells)}")
    colour = None if channels is None else _colour([cells[one] for one in channels], place)
    return Entry(_name(cells[name], place), None if value is None else _number(cells[value], place), colour)


def _names(path: Path) -> Iterator[Callable[[], Entry]]:
    """A name a line; labelme's `__ignore__`, its first, has no number."""
    for place, line in _lines(path):
        if line != "__ignore__":
            yield partial(_named, line, place)


def _named(line: str, place: str) -> Entry:
    return Entry(_name(line, place))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that say something, each with its place."""
    for number, line in enumerate(read_lines(path), start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield f"{path} line {number}", text


def _name(text: str, place: str) -> str:
    if not 0 < len(text.strip()) <= LONGEST:
        raise InputError(f"{place}: expected a name of 1 to {LONGEST} characters, got {shown(text)}")
    return text.strip()


def _number(text: str, place: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise InputError(f"{place}: expected the value of a pixel, got {shown(text)}")
    return int(text)


def _colour(parts: Iterable[str], place: str) -> tuple[int, int, int]:
    numbers = [_number(part.strip(), place) for part in parts]
    if len(numbers) != 3 or max(numbers) > 255:
        raise InputError(f"{place}: expected a colour of three numbers 0..255, got {numbers}")
    return numbers[0], numbers[1], numbers[2]


TABLES: tuple[tuple[tuple[str, ...], Callable[[Path], Iterator[Callable[[], Entry]]]], ...] = (
    (("labelmap.txt",), _labelmap),
    (("class_dict.csv", "_classes.csv", "classes.csv", "class_dict_seg.csv"), _csv),
    (("label_colors.txt", "label_colours.txt", "colors.txt", "colormap.txt"), _colour_list),
    (("classes.txt", "class_names.txt", "codes.txt", "names.txt", "labels.txt"), _names),
)
