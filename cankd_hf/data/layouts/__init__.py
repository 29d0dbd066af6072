"""Data as people have it: the layouts of folders that `data.path` finds, one file each."""

import os
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.files import shortened, shown
from cankd_hf.data.common.holdout import held_out
from cankd_hf.data.layouts.ade20k import Ade20k
from cankd_hf.data.layouts.base import Found, Layout, Tree
from cankd_hf.data.layouts.cityscapes import Cityscapes
from cankd_hf.data.layouts.class_folders import ClassFolders
from cankd_hf.data.layouts.coco import CocoJson
from cankd_hf.data.layouts.csv_boxes import CsvBoxes
from cankd_hf.data.layouts.depth import DEPTHS, DepthMaps
from cankd_hf.data.layouts.flat import Flat
from cankd_hf.data.layouts.images_masks import ImagesAndMasks
from cankd_hf.data.layouts.names import meaning
from cankd_hf.data.layouts.voc_boxes import VocBoxes
from cankd_hf.data.layouts.voc_masks import VocMasks
from cankd_hf.data.layouts.yolo import Yolo
from cankd_hf.errors import InputError

# Tried in this order, the most specific first. A new layout: one file, one line here, a section in docs/data.md.
MASKS: tuple[Layout, ...] = (Cityscapes(), Ade20k(), VocMasks(), ImagesAndMasks())
BOXES: tuple[Layout, ...] = (CocoJson(), VocBoxes(), Yolo(), CsvBoxes())
LAYOUTS: tuple[Layout, ...] = (DepthMaps(), *MASKS, *BOXES, ClassFolders(), Flat())
FIXES = {
    "masks": "put the masks in a folder masks/, named as their images are, or list them in metadata.jsonl",
    "boxes": "add the files with the boxes, or list them in metadata.jsonl",
    "instances": "add files with the outlines of objects, or list them in metadata.jsonl",
    "classes": "sort the images into a folder for each class",
    "depths": "put the depth maps in a folder depth/, named as their images are, or list them in metadata.jsonl",
}
OTHER_TASKS = {  # what fits the set instead
    ("masks", "boxes"): "detection",
    ("boxes", "masks"): "segmentation",
    ("instances", "boxes"): "detection",
    ("instances", "masks"): "segmentation",
}
EXPECTED = {
    "masks": "images/ and masks/ with equal names of files, or another layout with masks (docs/data.md)",
    "boxes": "YOLO, Pascal VOC or COCO json, or metadata.jsonl with objects (docs/data.md)",
    "instances": "COCO json or YOLO with outlines, or metadata.jsonl with objects (docs/instance_segmentation.md)",
    "classes": "a folder of images for each of two or more classes (docs/data.md)",
    "depths": "images/ and depth/ with equal names, or metadata.jsonl with depth_file_name (docs/depth.md)",
    "images": "images (docs/data.md)",
}


def look(root: Path, need: str | None = None) -> Found:
    """Finds out what a folder holds, from names and small files alone.

    Args:
        root: the folder; what is in a folder of its own inside it is found too.
        need: what is needed of it, of `KINDS`; None: anything, the most telling first. For "images" any set will do,
            whatever may be wrong with its labels.

    Raises:
        InputError: if no layout fits: with what is there, what was expected, and all that is missing.
    """
    whole = Tree(root)
    inner = _own_folder(whole)
    problems: list[str] = []
    for layout in LAYOUTS:
        if need in ("boxes", "instances") and layout in MASKS:  # what is wrong with masks does not matter
            continue
        tree = whole if isinstance(layout, Flat) else inner  # images are found in any folder
        try:
            found = layout.find(tree, need)
        except InputError as error:
            if need != "images":
                raise
            problems += error.problems  # of labels, while the images may be found by another layout
            continue
        if found is not None and (need in (None, "images") or need in found.kinds):
            if tree.root != root:
                found.notes.insert(0, f"found in {tree.root.relative_to(root)}/ of {root}")
            found.notes += tree.notes
            if need is None and isinstance(layout, Flat) and (above := _whole(root)) is not None:
                found.whole, others = above
                found.notes.append(
                    f"a part of a set: data.path={found.whole} reads images with their {others.kinds[0]}"
                )
            return _with_held_out(found)
    raise InputError(dict.fromkeys(problems) or _nothing(root, inner, need))


def _with_held_out(found: Found) -> Found:
    """The same with the parts of its training images that a run takes where there is no validation split. Raises
    InputError for class names that would break lines of tables and cards, or take hold of a terminal."""
    names = found.labels.id2label.values() if found.labels is not None else ()
    odd = [name for name in names if not name.strip() or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name)]
    if odd:
        raise InputError(
            shortened(
                [
                    f"{found.label_source}: expected class names of one line without control characters, got "
                    f"{ascii(name)[:200]}; rename it"
                    for name in odd
                ]
            )
        )
    size = found.splits["train"].size if "train" in found.splits else None
    if "validation" not in found.splits and size is not None and size > 1:
        found.held_out = held_out("train", size, ["eval"], DataConfig().holdout)
    return found


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
    return (said := meaning(name)) is not None and not said.rest


# Files that a set may come in, and what to do with them.
OTHER_FILES = {
    (".heic", ".heif", ".avif", ".cr2", ".nef", ".arw", ".dng", ".psd", ".svg"): "save its pictures as JPEG or PNG",
    (".mp4", ".mov", ".avi", ".mkv", ".webm"): "take pictures out of its films: ffmpeg -i FILM -r 1 FOLDER/%06d.jpg",
    (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"): "unpack its archives",
    (".npy", ".npz", ".mat", ".h5", ".hdf5", ".tfrecord"): "write its arrays as pictures, or as parquet",
}


def _nothing(root: Path, tree: Tree, need: str | None) -> list[str]:
    """What to say where no layout fits."""
    wanted = EXPECTED.get(need or "images", "images")
    said = f"data.path: expected {wanted}, got {root} with {contents(tree)}"
    for name in tree.folders[""]:
        if (found := _any(tree.below(name), need)) is not None and (need is None or need in found.kinds):
            return [f"{said}; {name}/ holds {found.layout}: give data.path={root / name}", *tree.linked]
    if (found := _any(tree, None)) is not None:
        beside, above = _masks_beside(root) if need == "masks" else None, _whole(root)
        fix = f"give data.path={root.parent}, where {beside} is" if beside else FIXES.get(need or "", "")
        whole = above is None or above[0].resolve() == root.resolve().parent
        if above is not None and need in above[1].kinds and not (beside and whole):
            fix = f"give data.path={above[0]}, which is read as {above[1].layout}"
        if task := OTHER_TASKS.get((need or "", found.kinds[0])):
            fix = f"take a recipe with task: {task}, or {fix}"
        return [f"{said}, which is read as {found.layout}; {fix}", *tree.linked]
    endings = {os.path.splitext(name)[1].lower() for names in tree.files.values() for name in names}
    fixes = [fix for kinds, fix in OTHER_FILES.items() if endings & {*kinds}]
    return [f"{said}; {', '.join(fixes)}" if fixes else said, *tree.linked, *tree.notes]


def _any(tree: Tree, need: str | None) -> Found | None:
    """The first set that a layout finds, those that are incomplete left out."""
    for layout in LAYOUTS:
        with suppress(InputError):
            if (found := layout.find(tree, need)) is not None:
                return found
    return None


def _whole(root: Path) -> tuple[Path, Found] | None:
    """The folder of the labelled set that a folder of images is a part of, as its name and those beside it say; and
    what that set is."""
    place = root.resolve()
    whole = None
    while _telling(place.name):
        place = place.parent
        with suppress(InputError):  # only a hint is lost
            found = _any(Tree(place, _of_a_set), None)
            if found is not None and found.kinds[0] not in ("images", "classes"):
                whole = (place if root.is_absolute() else Path(os.path.relpath(place))), found
    return whole


def _of_a_set(name: str) -> bool:
    """Whether a folder of this name can be a part of a set of images and labels."""
    return _telling(name) or re.sub(r"[^a-z0-9]", "", name.lower()) in DEPTHS


def _masks_beside(root: Path) -> str | None:
    """The folder of masks beside a folder of images that was given instead of the one that holds both."""
    try:
        names = sorted(os.listdir(root.resolve().parent))
    except OSError:  # only a hint is lost
        return None
    return next(
        (f"{name}/" for name in names if (said := meaning(name)) and said.kind == "masks" and not said.rest), None
    )


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
