"""The images to label, the labelled set beside them, and the pictures that must be left out."""

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cankd_hf.config.data import DataConfig
from cankd_hf.config.reading import load_data_config
from cankd_hf.data.common.dataset import ImageDataset, Source, StreamSource
from cankd_hf.data.common.folders import SPLIT_NAMES, FolderSource
from cankd_hf.data.common.hashes import hashes_of
from cankd_hf.data.common.opening import open_set
from cankd_hf.data.common.sources import by_role, find_split
from cankd_hf.errors import InputError
from cankd_hf.tasks import TASKS, Task

LOOKED_AT = 1000  # labelled images that priors are taken from, spread over the set
HELD_OUT = ("validation", "test")


@dataclass
class Picture:
    """One image of the set to label: its place there, its name in the output, and what tells whether it changed."""

    number: int
    source: str
    file_name: str
    file: Path | None  # None: it has no file of its own
    stat: list[int] | None  # size and time of the file

    @property
    def stem(self) -> str:
        """The name of the files that belong to it."""
        return Path(self.file_name).stem


@dataclass
class Images:
    """The images to label."""

    config: DataConfig
    source: Source
    pictures: list[Picture]
    own: list[tuple[Source, int]] = field(default_factory=list)  # held-out pictures of the same set


@dataclass
class LabelledSet:
    """A labelled set: its classes, its splits, and the labels that priors come from."""

    path: str
    names: dict[int, str]
    palette: Mapping[int, Sequence[int]] | None
    splits: dict[str, ImageDataset]  # by role: train, eval, test

    def labels(self) -> list[Any]:
        """Labels of its training images, up to `LOOKED_AT`."""
        data = self.splits["train"]
        places = np.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).astype(int)
        return [data.raw(int(place)).label for place in places]


def open_images(options: argparse.Namespace) -> Images:
    """Opens the images to label, without their labels if they have any.

    Raises:
        InputError: for a set that does not exist, lacks the split, or is a stream.
    """
    given = [word for word in options.overrides if "=" in word]
    if strange := [word for word in options.overrides if "=" not in word]:
        raise InputError(f"{strange[0]!r}: expected data.key=value, got no `=`; name one TEACHER and one FOLDER")
    path = options.folder
    config = load_data_config(None, ["data.path=shapes", *given])
    config = replace(config, path=path, train_split=options.split, eval_split=None, test_split=None)
    if config.streaming:
        raise InputError("data.streaming: expected false, as a stream cannot be gone on with, got true; leave it out")
    catalog = open_set(config, need_masks=False)
    try:
        source, indices = by_role(config, catalog, ["train"])["train"]
    except InputError as error:
        raise InputError([said.replace("data.train_split", "--split") for said in error.problems]) from error
    assert not isinstance(source, StreamSource)
    own_split = find_split(options.split, catalog.names())
    held = [name for name in catalog.names() if name != own_split and SPLIT_NAMES.get(name.lower(), name) in HELD_OUT]
    own = [(other, index) for name in held for other in [catalog.source(name)] for index in range(len(other))]  # type: ignore[arg-type]
    return Images(config, source, pictures_of(source, indices), own)  # type: ignore[arg-type]


def pictures_of(source: Source, indices: Sequence[int]) -> list[Picture]:
    """Each image with a name in the output that no other has, with or without its ending."""
    rows = source.rows if isinstance(source, FolderSource) else None
    sources = [source.name(index) for index in indices]
    files = [None if rows is None else rows[index].image for index in indices]
    stems = Counter(Path(name).stem.casefold() for name in sources)
    found = []
    for index, name, file in zip(indices, sources, files, strict=True):
        if file is None:
            called = f"{index:08d}.png"
        elif stems[Path(name).stem.casefold()] == 1:
            called = Path(name).name
        else:  # the folders and the ending tell it from the others of this name
            called = re.sub(r"[/.]", "__", name) + Path(name).suffix
        there = os.stat(file) if file is not None and file.is_file() else None
        stat = None if there is None else [there.st_size, there.st_mtime_ns]
        found.append(Picture(index, name, f"images/{called}", file, stat))
    return found


def open_labelled(path: str, kind: type[Task] | None) -> LabelledSet:
    """Opens a labelled set; without a `kind` only for its class names.

    Raises:
        InputError: naming `--labelled` for a set that cannot be read.
    """
    tried: list[str] = []
    for task in [kind] if kind is not None else TASKS.values():
        splits: dict[str, ImageDataset] = {}
        known: Any = None
        for role in ("train", "eval", "test"):
            config = DataConfig(path=path, test_split="test", check="none")
            try:
                known, data = task.from_data(config, splits=(role,))
            except InputError as error:
                if role == "train":
                    tried += error.problems
                    break
                continue
            splits[role] = getattr(data, role)
        if splits and known.id2label:
            return LabelledSet(path, dict(known.id2label), getattr(known, "palette", None), splits)
    raise InputError([f"--labelled {path}: {said}" for said in tried])


def held_out(images: Images, options: argparse.Namespace, labelled: LabelledSet | None) -> dict[str, str]:
    """Hash -> name of the pictures that may not be labelled: those of the validation and test splits of the set
    itself, of `--labelled` and of each `--not-in`; of one without such splits, all of them.

    With `--complete` also the labelled set's training pictures, which have a label already.
    """
    pictures = list(images.own)
    if labelled is not None:
        roles = [role for role in labelled.splits if role != "train" or options.complete]
        pictures += [
            (labelled.splits[role].source, index) for role in roles for index in labelled.splits[role].indices
        ]
    for path in options.not_in:
        catalog = _opened(path)
        names = [name for name in catalog.names() if SPLIT_NAMES.get(name.lower(), name) in HELD_OUT]
        for source in map(catalog.source, names or catalog.names()):
            pictures += [(source, index) for index in range(len(source))]
    return hashes_of(pictures, "reading held-out images")


def _opened(path: str) -> Any:
    try:
        return open_set(DataConfig(path=path, check="none"), need_masks=False)
    except InputError as error:
        raise InputError([f"--not-in {path}: {said}" for said in error.problems]) from error


def check_classes(labelled: LabelledSet, names: Mapping[int, str]) -> None:
    """Raises InputError where a labelled set has other classes than the teacher."""
    own, theirs = ([known[key] for key in sorted(known)] for known in (dict(names), labelled.names))
    unnamed = [f"LABEL_{number}" for number in range(len(own))]
    if own != theirs and not (own == unnamed and len(own) == len(theirs)):
        raise InputError(
            f"--labelled {labelled.path}: expected the teacher's classes {json.dumps(own[:12])}, got "
            f"{json.dumps(theirs[:12])}; name the set that the teacher was trained on"
        )
