"""The xml files of Pascal VOC, read without entities."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from cankd_hf.data.common.files import not_a_file, shown
from cankd_hf.data.common.labels import LONGEST
from cankd_hf.errors import InputError

XML_LIMIT = 2**24  # bytes
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class _Entity(Exception):
    """A file declares one."""


@dataclass
class VocObject:
    """An object as it is written."""

    place: str  # file and number, from 1
    name: str  # of its class
    corners: tuple[float, float, float, float]  # xmin, ymin, xmax, ymax
    difficult: bool


@dataclass
class VocFile:
    """One xml file."""

    file_name: str  # of its image; "" if it has none
    size: tuple[int, int] | None  # width, height
    objects: list[VocObject]
    problems: list[str] = field(default_factory=list)  # objects that cannot be read


def read_xml(file: Path, place: str) -> VocFile:
    """Read a file of annotations. Raises InputError for one that is no xml of an `annotation`."""
    root = _parsed(file, place)
    if root.tag != "annotation":
        raise InputError(f"{place}: expected xml with <annotation> on the outside, got <{root.tag[:40]}>")
    found = VocFile((root.findtext("filename") or "").strip(), _size(root), [])
    for number, entry in enumerate(root.iter("object"), start=1):
        read = _object(entry, f"{place} object {number}")
        if isinstance(read, str):
            found.problems.append(read)
        else:
            found.objects.append(read)
    return found


def is_voc(file: Path) -> bool:
    """Whether a file looks like one, from its first bytes."""
    if not_a_file(file):
        return False
    try:
        with file.open("rb") as opened:
            return re.search(rb"<annotation[\s>]", opened.read(1024)) is not None
    except OSError:
        return False


def _parsed(file: Path, place: str) -> Element:
    """The tree of a file, which may not declare entities: they can be used to read other files, or to fill memory."""
    if problem := not_a_file(file):
        raise InputError(f"{place}: expected an xml file, got {problem}")

    def refuse(*_: object) -> None:
        raise _Entity

    tree, parser = TreeBuilder(), expat.ParserCreate()
    handlers: dict[str, Callable[..., object]] = {
        "StartElementHandler": tree.start,
        "EndElementHandler": tree.end,
        "CharacterDataHandler": tree.data,
        "EntityDeclHandler": refuse,
    }
    for name, handler in handlers.items():
        setattr(parser, name, handler)
    try:
        with file.open("rb") as opened:
            content = opened.read(XML_LIMIT + 1)
        if len(content) > XML_LIMIT:
            raise InputError(f"{place}: expected an xml file of at most {XML_LIMIT} bytes, got more")
        parser.Parse(content, True)
        root: Element = tree.close()
    except _Entity:
        raise InputError(f"{place}: expected xml without entities of its own, got a declaration of one") from None
    except (expat.ExpatError, OSError, ValueError, LookupError) as error:
        raise InputError(f"{place}: expected an xml file in UTF-8, got {error or 'none'}") from None
    return root


def _size(root: Element) -> tuple[int, int] | None:
    """Width and height, where they are given; some tools write 0."""
    given = [(root.findtext(f"size/{key}") or "").strip() for key in ("width", "height")]
    if not all(text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) for text in given):
        return None
    return int(given[0]), int(given[1])


def _object(entry: Element, place: str) -> VocObject | str:
    """An object, or what is wrong with it."""
    name = (entry.findtext("name") or "").strip()
    if not 0 < len(name) <= LONGEST:
        return f"{place}: expected the name of a class in <name>, got {shown(name) if name else 'none'}"
    box = entry.find("bndbox")
    texts = [] if box is None else [(box.findtext(key) or "").strip() for key in CORNERS]
    try:
        left, top, right, bottom = map(float, texts)
    except ValueError:
        got = "no <bndbox>" if box is None else shown(dict(zip(CORNERS, texts, strict=True)))
        return f"{place} ({name}): expected numbers as {', '.join(CORNERS)}, got {got}"
    if right < left or bottom < top or not all(map(math.isfinite, (left, top, right, bottom))):
        shown_box = f"[{left:g}, {top:g}, {right:g}, {bottom:g}]"
        return f"{place} ({name}): expected xmin up to xmax and ymin up to ymax, got {shown_box}; correct or drop it"
    return VocObject(place, name, (left, top, right, bottom), (entry.findtext("difficult") or "").strip() == "1")
