"""What a folder holds: the seam between the layouts that people have and the loaders of the tasks."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.files import outside, printable
from cankd_hf.data.common.folders import IMAGE_ENDINGS, usual_split
from cankd_hf.data.common.holdout import held_out
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.data.layouts.drawn import DrawnMasks
from cankd_hf.data.layouts.names import meaning
from cankd_hf.errors import InputError
from cankd_hf.names import RUN_FILES

KINDS = ("masks", "boxes", "instances", "classes", "depths", "images")  # what a set can give
DEEPEST = 32  # folders below the given one that are looked into
NOT_DATA = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini"}


@dataclass
class Content:
    """What was read of a split; `rows` has masks where the set has mask files ("" for an image without one)."""

    rows: Rows
    objects: AnnotationTable | None = None  # the boxes of each row
    classes: Sequence[int] | None = None  # the class of each row
    drawn: DrawnMasks | None = None  # masks that are drawn from outlines
    bare: Sequence[int] = ()  # indices of the images of which nobody said what they show
    notes: list[str] = field(default_factory=list)  # told to the user, as those of `Found`


@dataclass
class Split:
    """One split of a set. Looking at a folder makes it without reading more than names.

    Args:
        size: its images, where looking tells; None: only reading does.
        reader: reads it; called once.
    """

    size: int | None
    reader: Callable[[], Content]

    @cached_property
    def content(self) -> Content:
        """Its images and labels. Raises InputError listing everything in it that cannot be used."""
        return self.reader()


@dataclass
class Found:
    """A set as it was found in a folder.

    Attributes:
        layout: its name as a person says it, such as "images and masks".
        kinds: what it can give, of `KINDS`, the first being what it was made for.
        root: the folder that holds it, which may be one inside the given one; names are relative to it.
        splits: by canonical names (`train`, `validation`, `test`), else by their own.
        labels: names, colours and values of the classes, where the data has them.
        notes: what was assumed, and what was left out, told to the user.
        label_source: where the class names are from, such as `data.yaml`; "" where the data has none.
        settings: settings of the `data:` section that this set needs beside its path and splits.
        held_out: role (`train`, `eval`) -> slice, such as `train[:90%@0]`, where the set has no validation split.
        whole: the folder of the set that these images are a part of, whose labels are outside of theirs; None: these
            are all.
    """

    layout: str
    kinds: tuple[str, ...]
    root: Path
    splits: dict[str, Split]
    labels: Labels | None = None
    notes: list[str] = field(default_factory=list)
    label_source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    whole: Path | None = None

    def section(self) -> dict[str, Any]:
        """The `data:` section to paste, which says what `data.path` alone finds."""
        usual = {"train": "train", "eval": "validation", "test": "test"}
        if not self.held_out and "validation" not in self.splits and "train" in self.splits:  # known by reading alone
            size = len(self.splits["train"].content.rows)
            self.held_out = held_out("train", size, ["eval"], DataConfig().holdout) if size > 1 else {}
        chosen = {role: self.held_out.get(role, name if name in self.splits else None) for role, name in usual.items()}
        chosen["train"] = chosen["train"] or next(iter(self.splits))
        return {"path": str(self.root), **{f"{role}_split": split for role, split in chosen.items()}, **self.settings}


class Tree:
    """Names below a folder, listed once, without hidden ones and those that systems leave (`._x`, `Thumbs.db`).

    Folders are named as in `a/b`, the root is "". Links to folders outside are not followed, see `refuse_links`.

    Args:
        root: the folder.
        only: says of the name of a folder in it whether it is looked into; None: all are.
    """

    def __init__(self, root: Path, only: Callable[[str], bool] | None = None) -> None:
        self.root, self.only = root, only
        self.files: dict[str, list[str]] = {}  # folder -> its files, sorted
        self.folders: dict[str, list[str]] = {}  # folder -> the folders in it, sorted
        self.linked: list[str] = []  # problems: links out of it that are called as a part of a set is
        self.notes: list[str] = []  # other folders that are not looked into
        self._seen: set[str] = set()
        self._unread: list[str] = []  # names that no text can hold
        self._list("", 0)
        if self._unread:
            said = f"{len(self._unread)} names are no UTF-8 and are not used, first {self._unread[0]!a}; rename them"
            self.notes.append(said)

    def _list(self, folder: str, depth: int) -> None:
        where = os.path.join(self.root, folder) if folder else os.fspath(self.root)
        files, folders, links = list[str](), list[str](), set[str]()
        try:
            with os.scandir(where) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.lower() in NOT_DATA:
                        continue
                    if not printable(entry.name):
                        self._unread.append(f"{folder}/{entry.name}".lstrip("/"))
                        continue
                    # a folder named as an image is told of when it is read; `entry.is_dir` raises for circles of links
                    is_folder = os.path.isdir(entry.path) and not is_image(entry.name)
                    if is_folder and not folder and self.only is not None and not self.only(entry.name):
                        continue
                    (folders if is_folder else files).append(entry.name)
                    if is_folder and entry.is_symlink():
                        links.add(entry.name)
        except OSError as error:
            said = f"expected a folder that can be read, got {where}: {error.strerror}"
            if not folder:
                raise InputError(f"data.path: {said}") from None
            self.notes.append(said)
        if folder and not RUN_FILES.isdisjoint(files):  # a run, whose pictures are no data
            files, folders = [], []
        self.files[folder], self.folders[folder] = sorted(files), sorted(folders)
        for name in self.folders[folder] if depth < DEEPEST else ():
            if name in links:
                path = os.path.join(where, name)
                problems, real = outside(self.root, [path]), os.path.realpath(path)
                if problems or real in self._seen or self._within(real):
                    (self.linked if meaning(name) else self.notes).extend(problems)
                    continue
                self._seen.add(real)
            self._list(f"{folder}/{name}" if folder else name, depth + 1)

    def _within(self, real: str) -> bool:
        """Whether a link leads to the root or a folder above it: a circle."""
        return os.path.join(os.path.realpath(self.root), "").startswith(os.path.join(real, ""))

    @cached_property
    def images(self) -> dict[str, list[str]]:
        """Folder -> its files whose endings are those of pictures, for folders that have any."""
        pictures = {folder: [name for name in names if is_image(name)] for folder, names in self.files.items()}
        return {folder: names for folder, names in pictures.items() if names}

    def find(self, *names: str, folder: str = "") -> str | None:
        """The first file of a folder with one of these names, in any case."""
        known = {name.lower(): name for name in self.files.get(folder, [])}
        found = next((known[name.lower()] for name in names if name.lower() in known), None)
        return found and (f"{folder}/{found}" if folder else found)

    def path(self, name: str) -> Path:
        """The path of a name in the tree."""
        return self.root / name

    def below(self, name: str) -> "Tree":
        """The tree of a folder in it."""
        return Tree(self.root / name)

    def refuse_links(self, names: Sequence[str] = ()) -> list[str]:
        """Problems of links that lead out of the folder: those to folders, and those of the files `names`."""
        return [*self.linked, *outside(self.root, (os.path.join(self.root, name) for name in names))]


class Layout(Protocol):
    """One way in which people keep a set."""

    name: str

    def find(self, tree: Tree, need: str | None) -> Found | None:
        """The set in a folder, if it is of this layout and gives what is needed; "images" is given by every set.

        Args:
            tree: what the folder holds.
            need: what is needed of it, of `KINDS`; None: anything.

        Raises:
            InputError: with all problems at once, where the folder is clearly of this layout but incomplete.
        """


def is_image(name: str) -> bool:
    """Whether a file name ends as pictures do, in any case."""
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS


def canonical(name: str) -> str:
    """The usual name of a split: `val` is `validation`; another name is kept."""
    return usual_split(name)


def ordered(splits: Mapping[str, Split]) -> dict[str, Split]:
    """The splits in the usual order: train, validation, test, others."""
    usual = [name for name in ("train", "validation", "test") if name in splits]
    return {name: splits[name] for name in [*usual, *(name for name in splits if name not in usual)]}
