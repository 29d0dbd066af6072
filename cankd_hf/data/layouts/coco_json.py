"""COCO json as it is found: which files of a folder are, of which splits, and where their images are."""

import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from cankd_hf.data.common.files import not_a_file
from cankd_hf.data.common.folders import usual_split
from cankd_hf.data.detection.coco import categories_of
from cankd_hf.data.layouts.base import Tree
from cankd_hf.data.layouts.elsewhere import ByName, file_name, file_split, join
from cankd_hf.errors import InputError

HEAD = 2**16  # bytes from whose keys a file is recognised
MANY = 50  # json files in one folder: then each is that of an image
LIST = re.compile(rb'"images"\s*:\s*\[')
KEYS = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')
NAMED = re.compile(rb'"file_name"\s*:')
OUTLINE = re.compile(rb'"segmentation"\s*:\s*(\[\s*\[?\s*-?[0-9]|\{)')
OTHER_ANSWERS = ("captions", "panoptic", "image_info")  # how files of other tasks begin
RANKS = {"boxes": ("person_keypoints", "stuff"), "masks": ("person_keypoints",)}  # what is read where nothing else is


def coco_files_of(tree: Tree, need: str | None) -> tuple[dict[str, str], list[str]]:
    """Split -> COCO json of a folder, and notes on those that are not read. Raises InputError if two are of one."""
    found: dict[str, list[str]] = {}
    notes = []
    for folder, names in tree.files.items():
        files = [name for name in names if name.lower().endswith(".json")]
        for name in files if len(files) <= MANY else ():
            path = join(folder, name)
            if not name.startswith(OTHER_ANSWERS) and is_coco(tree.path(path)):
                found.setdefault(file_split(path) or "", []).append(path)
    if "" in found and len(found) > 1:  # all of it beside its parts
        notes.append(f"{', '.join(found.pop(''))}: not read, as other files name their split")
    problems, chosen = [], {}
    for split, files in found.items():
        least = min(_rank(file, need) for file in files)
        best = [file for file in files if _rank(file, need) == least]
        if len(best) > 1:
            problems.append(
                f"{tree.root}: expected one COCO json for {split or 'all images'}, got {', '.join(best)}; keep "
                "one, or name those to read as data.annotations, such as annotations/instances_{split}.json"
            )
        chosen[split or "train"] = best[0]
        others = [file for file in files if file != best[0]]
        notes += [f"{best[0]} is read, not {', '.join(others)}"] if others else []
    if problems:
        raise InputError(problems)
    return chosen, notes


def class_names(tree: Tree, file: str) -> dict[int, str] | None:
    """Id and name of the categories of a file, without reading all of it; None if they are not found that way."""
    with _bytes(tree.path(file)) as content:
        place = len(content)
        while (place := content.rfind(b'"categories"', 0, place)) >= 0:
            text = content[place + len('"categories"') : place + 2**22].decode("utf-8", "replace")
            try:
                entries, _ = json.JSONDecoder().raw_decode(text.lstrip().removeprefix(":").lstrip())
                return categories_of(entries, file)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # of which InputError is one: reading the file says what is wrong
    return None


def has_outlines(tree: Tree, file: str) -> bool:
    """Whether a file has an outline of an object."""
    with _bytes(tree.path(file)) as content:
        return OUTLINE.search(content) is not None


def count_images(tree: Tree, file: str) -> int:
    """How many images a file names, without parsing it."""
    with _bytes(tree.path(file)) as content:
        return sum(1 for _ in NAMED.finditer(content))


@contextmanager
def _bytes(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, which is not read into memory."""
    with path.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_size:  # which cannot be mapped
            yield b""
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


class ImagesOf:
    """Finds the images of a COCO json in a folder, wherever its `file_name` is relative to, or from."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def names(self) -> ByName:
        """The images of the folder, which is listed when the first is asked for."""
        return ByName(Tree(self.root), file_name)

    def locate(self, file: str, split: str, names: Sequence[str]) -> list[str]:
        """Names in the tree of the images that a json of a split names; those not found as they are written."""
        folder, wanted = file.rpartition("/")[0], usual_split(split)
        return [self.names.find(name, folder, wanted) or name for name in names]


def is_coco(path: Path) -> bool:
    """Whether a file looks like COCO json: one of its keys at the beginning, and a list of images."""
    if not_a_file(path):
        return False
    try:
        with path.open("rb") as opened:
            head = opened.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"{") or KEYS.search(head) is None:
            return False
        with _bytes(path) as content:
            return LIST.search(content) is not None
    except OSError:
        return False


def _rank(file: str, need: str | None) -> int:
    name: Any = file.rpartition("/")[2].lower()
    return 1 + next((n for n, start in enumerate(RANKS.get(need or "boxes", ())) if name.startswith(start)), -1)
