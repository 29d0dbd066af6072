"""Data as people have it: the layouts of folders that `data.path` finds, one file each."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cankd_hf.data.common.files import shown
from cankd_hf.data.layouts.ade20k import Ade20k
from cankd_hf.data.layouts.base import Found, Layout, Tree
from cankd_hf.data.layouts.cityscapes import Cityscapes
from cankd_hf.data.layouts.coco import CocoJson
from cankd_hf.data.layouts.csv_boxes import CsvBoxes
from cankd_hf.data.layouts.flat import Flat
from cankd_hf.data.layouts.images_masks import ImagesAndMasks
from cankd_hf.data.layouts.names import meaning
from cankd_hf.data.layouts.roboflow_masks import RoboflowMasks
from cankd_hf.data.layouts.voc_boxes import VocBoxes
from cankd_hf.data.layouts.voc_masks import VocMasks
from cankd_hf.data.layouts.yolo import Yolo
from cankd_hf.errors import InputError

# Tried in this order, the most specific first. A new layout: one file, one line here, a section in docs/data.md.
MASKS: tuple[Layout, ...] = (Cityscapes(), Ade20k(), VocMasks(), RoboflowMasks(), ImagesAndMasks())
BOXES: tuple[Layout, ...] = (CocoJson(), VocBoxes(), Yolo(), CsvBoxes())
LAYOUTS: tuple[Layout, ...] = (*MASKS, *BOXES, Flat())
PLURAL = {"masks": "a mask for each image", "boxes": "boxes", "classes": "a class for each image", "images": "images"}
EXPECTED = {
    "masks": "images/ and masks/ with equal names of files, or another layout with masks (docs/data.md)",
    "boxes": "YOLO, Pascal VOC or COCO json, or metadata.jsonl with objects (docs/data.md)",
    "classes": "a folder of images for each class (docs/data.md)",
    "images": "images (docs/data.md)",
}


def look(root: Path, need: str | None = None) -> Found:
    """Finds out what a folder holds, from names and small files alone.

    Args:
        root: the folder; what is in a folder of its own inside it is found too.
        need: what is needed of it, of `KINDS`; None: anything, the most telling first.

    Raises:
        InputError: if no layout fits: with what is there, what was expected, and all that is missing.
    """
    whole = Tree(root)
    inner = _own_folder(whole)
    problems: list[str] = []
    others: list[Found] = []
    for layout in LAYOUTS:
        tree = whole if isinstance(layout, Flat) else inner  # images are found in any folder
        try:
            found = layout.find(tree, need)
        except InputError as error:
            problems += error.problems
            continue
        if found is None:
            continue
        if need is None or need in found.kinds:
            if tree.root != root:
                found.notes.insert(0, f"found in {tree.root.relative_to(root)}/ of {root}")
            return found
        others.append(found)
    raise InputError(dict.fromkeys(problems) or _nothing(root, inner, need, others))


def _own_folder(tree: Tree) -> Tree:
    """The tree below folders that hold one folder and nothing else: an archive unzipped in a folder of its own."""
    folder = ""
    while not tree.files[folder] and len(tree.folders[folder]) == 1 and not any(map(_telling, tree.folders[folder])):
        inner = f"{folder}/{tree.folders[folder][0]}".lstrip("/")
        if inner not in tree.files:
            break
        folder = inner
    return tree.below(folder) if folder else tree


def _telling(name: str) -> bool:
    """Whether a folder's name is part of a layout."""
    return meaning(name) is not None


def _nothing(root: Path, tree: Tree, need: str | None, others: Sequence[Found]) -> list[str]:
    """What to say where no layout fits."""
    wanted = EXPECTED.get(need or "images", "images")
    said = f"data.path: expected {wanted}, got {root} with {contents(tree)}"
    if others:
        known = [f"{one.layout} ({', '.join(PLURAL[kind] for kind in one.kinds)})" for one in others]
        return [f"{said}, which is read as {known[0]}; name the folder that holds {PLURAL[need or 'images']} too"]
    for name in tree.folders[""]:
        for layout in LAYOUTS:
            try:
                found = layout.find(tree.below(name), need)
            except InputError:
                continue
            if found is not None and (need is None or need in found.kinds):
                return [f"{said}; {name}/ holds {found.layout}: give data.path={root / name}"]
    return [said, *tree.linked]


def contents(tree: Tree) -> str:
    """What a folder holds, in a line: its folders, and how many files of each ending are below it."""
    endings = Counter(Path(name).suffix.lower() or name for names in tree.files.values() for name in names)
    files = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(6)) or "no files"
    folders = ", ".join(f"{name}/" for name in tree.folders[""][:8])
    more = len(tree.folders[""]) - 8
    folders += f" and {more} more" if more > 0 else ""
    return f"{f'the folders {folders} and ' if folders else ''}{shown_plain(files)}"


def shown_plain(text: str) -> str:
    """A text without quotes, cut to about a line."""
    return shown(text).strip("'\"")
