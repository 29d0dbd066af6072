"""Opening a data set at `data.path`: the generated one, a table, or a local folder."""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import AnySource, Source
from cankd_hf.data.common.decode import make_decoder
from cankd_hf.data.common.files import not_a_file
from cankd_hf.data.common.folders import FolderSource, described, read_split, split_folders
from cankd_hf.data.common.labels import Labels, read_labels
from cankd_hf.data.common.soft import KEY as SOFT_KEY
from cankd_hf.data.common.soft import SoftSource
from cankd_hf.data.common.streams import stream_of
from cankd_hf.data.common.tables import is_table_path, labels_file, open_table
from cankd_hf.data.generated import SHAPE_CLASSES, SHAPE_PALETTE, generated_splits
from cankd_hf.data.layouts.catalog import FoundSet
from cankd_hf.errors import InputError

# Settings that say how files are read, which generated images are not.
OF_FILES = ("name", "revision", "image_column", "mask_column", "labels", "num_labels", "ignore_index", "reduce_labels")


def without_meaning(config: DataConfig, *names: str, where: str) -> list[str]:
    """A warning that names the settings that were given and have no effect here, if any."""
    default = DataConfig()
    given = [f"data.{name}" for name in names if getattr(config, name) != getattr(default, name)]
    return [f"no effect with {where}: {', '.join(given)}; remove what is meant for other data"] if given else []


class SplitCatalog(Protocol):
    """An opened data set, whose splits are read by name."""

    warnings: list[str]

    @property
    def labels(self) -> Labels:
        """Its classes."""

    def names(self) -> list[str]:
        """Its splits."""

    def source(self, name: str) -> AnySource:
        """The samples of one split."""


class Folder:
    """A local folder of images, with masks if they are needed."""

    def __init__(self, config: DataConfig, root: Path, need_masks: bool) -> None:
        self.root = root
        self.config = config
        self.folders = split_folders(root)
        self.mask_column = config.mask_column if need_masks else None
        self.warnings = without_meaning(config, "name", "revision", where="a local folder")

    @cached_property
    def labels(self) -> Labels:
        # Read when it is asked for, so that its problems are told with those of the splits.
        return read_labels(self.config, labels_file(self.config) if self.mask_column is not None else None)

    def names(self) -> list[str]:
        return list(self.folders)

    def source(self, name: str) -> AnySource:
        keep = () if self.mask_column is None else (SOFT_KEY,)
        folder, column = self.folders[name], self.config.image_column
        rows, values, warnings = read_split(self.root, folder, column, self.mask_column, keep)
        self.warnings += warnings
        decoder, masked = make_decoder(self.config, self.labels), self.mask_column is not None
        source = FolderSource(rows, decoder, masked=masked)
        if self.config.soft_targets and any(line.get(SOFT_KEY) for line in values):
            source = SoftSource(rows, decoder, masked=masked, soft=[line.get(SOFT_KEY) or "" for line in values])
        return stream_of(source) if self.config.streaming and rows else source


class Generated:
    """The generated set with labels of one kind; `told` are settings that the task itself names as without effect."""

    def __init__(self, config: DataConfig, kind: str, labels: Labels, told: Sequence[str] = (), bare: bool = False):
        self.splits = generated_splits(config.generated, not bare, kind)
        self.labels = labels
        unused = [name for name in (*OF_FILES, "streaming", "shuffle_buffer") if name not in told]
        self.warnings = without_meaning(config, *unused, where="generated images")

    def names(self) -> list[str]:
        return list(self.splits)

    def source(self, name: str) -> Source:
        return self.splits[name]


ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


def open_any(
    config: DataConfig,
    generated: Callable[[], SplitCatalog],
    table: Callable[[], SplitCatalog],
    folder: Callable[[Path], SplitCatalog],
) -> SplitCatalog:
    """The data set at `data.path`: the generated one, a table of a file or of the Hub, or that of a local folder."""
    path = str(config.path)
    if path == "shapes":
        return generated()
    if is_table_path(path) or not os.path.lexists(path):
        return table()
    return folder(folder_at(path))


def open_set(config: DataConfig, need_masks: bool) -> SplitCatalog:
    """Opens the data set at `data.path`, of any kind, with masks or as images alone."""

    def of_folder(root: Path) -> SplitCatalog:
        if described(root) and not (need_masks and config.annotations != "auto"):
            return Folder(config, root, need_masks)
        return FoundSet(config, root, "masks" if need_masks else "images")

    labels = Labels(id2label=dict(SHAPE_CLASSES), palette=dict(SHAPE_PALETTE))
    return open_any(
        config,
        lambda: Generated(config, "masks", labels, bare=not need_masks),
        lambda: open_table(config, need_masks),
        of_folder,
    )


def folder_at(path: str) -> Path:
    """The data folder at an existing path; InputError if it is none."""
    if not os.path.isdir(path):
        kind = not_a_file(Path(path))
        packed = path.lower().endswith(ARCHIVES)
        fix = "unpack it, and give the folder" if packed else f"give its folder, {Path(path).parent}"
        said = f"{kind}; it is at {path}" if kind else f"the file {path}; {fix}"
        raise InputError(f"data.path: expected a folder, a parquet file or a Hub id, got {said}")
    return Path(path)
