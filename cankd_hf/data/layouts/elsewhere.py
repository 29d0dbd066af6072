"""Files of a folder by the paths that other machines and tools wrote, and sizes of images from their headers."""

import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path, PureWindowsPath

from PIL import Image

from cankd_hf.data.common.decode import ORIENTATION
from cankd_hf.data.common.files import not_a_file
from cankd_hf.data.common.folders import MASK_FOLDERS, SPLIT_NAMES, YEAR
from cankd_hf.data.layouts.base import Tree

NOT_IMAGES = MASK_FOLDERS | {"segmentationclass", "segmentationobject", "xmls"}  # folders of other pictures
TURNED = (5, 6, 7, 8)  # orientations of EXIF that swap width and height


def same(text: str) -> str:
    """A name as it is compared: without case, and with one form of each accented letter (macOS writes another)."""
    return unicodedata.normalize("NFC", text).casefold()


def stem(name: str) -> str:
    """The name of a file without its folder and ending, as it is compared."""
    return same(os.path.splitext(name.rpartition("/")[2])[0])


def join(folder: str, name: str) -> str:
    """The name in the tree of a file in a folder."""
    return f"{folder}/{name}" if folder else name


class Elsewhere:
    r"""Finds what is in a folder by paths written on another machine, or relative to another folder.

    `C:\data\set\images\a.jpg`, `/home/me/set/images/a.jpg` and `../set/images/a.jpg` all mean `images/a.jpg` if the
    folder has it, in any case. A path that goes up inside of itself (`a/../../b`) means nothing.

    Args:
        tree: the folder.
        base: a folder in it, to which relative paths may be relative too.
    """

    def __init__(self, tree: Tree, base: str = "") -> None:
        self.tree, self.bases = tree, list(dict.fromkeys([base, ""]))
        self.known = {same(folder): folder for folder in tree.files}
        self._parents: dict[Sequence[str], list[str]] = {}
        self._names: dict[str, dict[str, str]] = {}

    def find(self, written: str) -> str | None:
        """The file or folder that a path means, by its name in the tree; None if there is none."""
        path = PureWindowsPath(written)  # takes both kinds of slashes
        parts = path.parts[1:] if path.anchor else path.parts
        while parts and parts[0] in (".", ".."):
            parts = parts[1:]
        if not parts or ".." in parts:
            return None if path.anchor or parts else self.bases[0]
        *folders, name = parts
        for parent in self._parents_of(tuple(folders)):
            if (found := self._in(parent, name)) is not None:
                return found
        return None

    def _parents_of(self, parts: Sequence[str]) -> list[str]:
        """The folders that the ends of a path mean, the longest end first."""
        if parts not in self._parents:
            ends = (
                "/".join([*filter(None, [base]), *parts[n:]]) for n in range(len(parts) + 1) for base in self.bases
            )
            found = (self.known.get(same(end)) for end in ends)
            self._parents[parts] = list(dict.fromkeys(end for end in found if end is not None))
        return self._parents[parts]

    def _in(self, folder: str, name: str) -> str | None:
        """The file or folder of this name in a folder."""
        if folder not in self._names:
            inside = [*self.tree.folders.get(folder, ()), *self.tree.files.get(folder, ())]
            self._names[folder] = {same(one): one for one in inside} | {one: one for one in inside}
        found = self._names[folder].get(name) or self._names[folder].get(same(name))
        return found and join(folder, found)


class ByName:
    """Finds files by their names alone, wherever they are in a folder.

    Args:
        tree: the folder.
        key: what two names of the same file have in common.
    """

    def __init__(self, tree: Tree, key: Callable[[str], str]) -> None:
        self.key = key
        self.known: dict[str, list[str]] = {}
        for folder, names in tree.images.items():
            for name in names:
                self.known.setdefault(key(name), []).append(join(folder, name))

    def find(self, written: str, folder: str, split: str | None = None) -> str | None:
        """The image of a name; None if there is none, or if several are meant as well.

        Args:
            written: its name or path; of several images of its name the one with the likest path is meant.
            folder: that of the file that names it, near to which it is.
            split: its split; images in a folder of another split are not meant.
        """
        found = self.known.get(self.key(written), [])
        if split is not None:
            found = [image for image in found if split_of(image.rpartition("/")[0]) in (None, split)]
        parts = [same(part) for part in re.split(r"[/\\\\]", written)]
        ranked = sorted((_distance(parts, folder, image), image) for image in found)
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        return ranked[0][1]


def _distance(parts: Sequence[str], folder: str, image: str) -> tuple[int, bool, bool, int]:
    """How unlikely an image is meant by a path in a file of a folder, among those of its name."""
    own = image.rpartition("/")[0]
    path = [same(part) for part in own.split("/")]
    alike = _alike(parts[-2::-1], path[::-1])
    near = _alike(same(folder).split("/"), path)
    return -alike, own != folder, any(part in NOT_IMAGES for part in path), -near


def _alike(first: Sequence[str], second: Sequence[str]) -> int:
    """How many parts two paths have in common from their beginning."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))])


def upright_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image as it is decoded, upright, from its header; None for a file that is no image, of
    which decoding tells more."""
    if not_a_file(path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
                turned = picture.getexif().get(ORIENTATION, 1) in TURNED
    except Exception:  # of any decoder, on bad bytes
        return None
    return (height, width) if turned else (width, height)


def split_of(folder: str) -> str | None:
    """The split whose name is in a path of folders, such as `validation` of `images/val2017`."""
    for part in folder.split("/"):
        if (name := YEAR.sub("", part.lower())) in SPLIT_NAMES:
            return SPLIT_NAMES[name]
    return None


def file_split(file: str) -> str | None:
    """The split that a word of a file's name says, else a folder above it."""
    folder, _, name = file.rpartition("/")
    words = re.findall(r"[a-z]+", os.path.splitext(name)[0].lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), split_of(folder))


def file_name(written: str) -> str:
    """The name of a file without its folders, as it is compared."""
    return same(re.split(r"[/\\]", written)[-1])
