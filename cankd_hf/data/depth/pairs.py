"""Folders of images and of depth maps with the same names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cankd_hf.data.common.files import outside, shortened
from cankd_hf.data.common.folders import IMAGE_ENDINGS, SPLIT_NAMES
from cankd_hf.data.common.rows import Rows
from cankd_hf.errors import InputError

IMAGE_FOLDERS = ("images", "image", "rgb", "img", "imgs")
DEPTH_FOLDERS = ("depth", "depths", "depth_maps", "depth_map")
DEPTH_ENDINGS = {".png", ".tif", ".tiff", ".npy", ".pgm"}
SUFFIX = re.compile(r"[_-](depth|rgb|colors?|image)$", re.IGNORECASE)  # of names that say what they are


def pairs_of(root: Path) -> dict[str, Callable[[], Rows]]:
    """Split -> what reads its rows, for `images/` beside `depth/`, in the folder, in each split's, or with a folder for
    each split in both; empty for a folder that is laid out otherwise or has metadata."""
    if any(os.path.lexists(place / f"metadata{end}") for place in _folders(root) for end in (".jsonl", ".csv")):
        return {}
    own = _sides(root)
    if own is not None:
        images, depths = own
        splits = _splits(images)
        if not splits:
            return {"train": partial(_rows, root, images, depths)}
        return {split: partial(_rows, root, images / name, _named(depths, split)) for split, name in splits.items()}
    sides = {split: _sides(root / name) for split, name in _splits(root).items()}
    return {split: partial(_rows, root, *both) for split, both in sides.items() if both is not None}


def _folders(root: Path) -> list[Path]:
    return [root, *(root / name for name in _splits(root).values())]


def _splits(folder: Path) -> dict[str, str]:
    """Canonical name of a split -> the name of its folder."""
    names = sorted(path.name for path in folder.iterdir() if os.path.isdir(path))
    return {SPLIT_NAMES[name.lower()]: name for name in names if name.lower() in SPLIT_NAMES}


def _named(folder: Path, split: str) -> Path:
    return folder / _splits(folder).get(split, split)


def _sides(folder: Path) -> tuple[Path, Path] | None:
    """The folder of images and that of depth maps."""
    names = {path.name.lower(): path for path in sorted(folder.iterdir()) if os.path.isdir(path)}
    found = [next((names[name] for name in of if name in names), None) for of in (IMAGE_FOLDERS, DEPTH_FOLDERS)]
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def _rows(root: Path, images: Path, depths: Path) -> Rows:
    """The images, each with the depth map of its name. Raises InputError with all that have none, or several."""
    named: dict[str, list[Path]] = {}
    for path in _files(depths, DEPTH_ENDINGS):
        named.setdefault(_stem(path, depths), []).append(path)
    pictures = _files(images, IMAGE_ENDINGS)
    problems = [
        f"{path.relative_to(root)}: expected one depth map {_stem(path, images)}.png (or .npy, .tif) in "
        f"{depths.relative_to(root)}, got {len(named.get(_stem(path, images), []))}"
        for path in pictures
        if len(named.get(_stem(path, images), [])) != 1
    ]
    if not pictures:
        problems = [f"{images.relative_to(root)}: expected images, found none"]
    chosen = [] if problems else [named[_stem(path, images)][0] for path in pictures]
    problems += outside(root, [str(path) for path in (*pictures, *chosen)])
    if problems:
        raise InputError(shortened(problems))
    return Rows(root, *([path.relative_to(root).as_posix() for path in side] for side in (pictures, chosen)))


def _files(folder: Path, endings: set[str]) -> list[Path]:
    found = [
        Path(where) / name
        for where, _, files in os.walk(folder)
        for name in files
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings
    ]
    return sorted(found)


def _stem(path: Path, folder: Path) -> str:
    return SUFFIX.sub("", path.relative_to(folder).with_suffix("").as_posix())
