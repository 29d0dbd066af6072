"""Loads data sets of images with depth maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import AnySource
from cankd_hf.data.common.folders import FILE_NAME, FolderSource, described, metadata_keys, read_split
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.common.opening import Folder, Generated, SplitCatalog, open_any, without_meaning
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.common.sources import ROLES, TaskData, by_role, wrap
from cankd_hf.data.common.streams import stream_of
from cankd_hf.data.common.tables import holds_images, open_table
from cankd_hf.data.depth.decode import depth_decoder
from cankd_hf.data.depth.transforms import DepthTrainTransform
from cankd_hf.data.layouts.catalog import FoundSet
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.transforms import EvalTransform
from cankd_hf.errors import InputError

DEPTH_COLUMNS = ["depth", "depth_map", "depths", "depth_maps"]
# Settings that are about masks and boxes.
OF_OTHERS = (
    *("mask_column", "objects_column", "annotations", "box_format", "labels", "num_labels", "ignore_index"),
    *("reduce_labels", "soft_targets", "keep_aspect"),
)
EXAMPLE = '{"file_name": "images/a.jpg", "depth_file_name": "depth/a.png"}'


def load_depth(config: DataConfig, splits: Sequence[str] = ROLES, seed: int = 0) -> TaskData:
    """Open, check and transform a set of images with depth maps; the arguments are those of `load_segmentation`.

    Items have `labels` float32 [h, w] in metres, 0 where the depth is not known, in evaluation of the size of each
    depth map. Raises InputError for a set that does not exist, lacks a split, or holds unusable images or depth maps
    (only entirely unusable splits with `on_error: skip`).
    """
    config.check_values()
    catalog = open_depth(config)
    catalog.warnings += without_meaning(config, *OF_OTHERS, where="depth maps")
    sources = by_role(config, catalog, splits)
    data = wrap(config, catalog, sources, True, seed, DepthTrainTransform(config), EvalTransform(config))
    data.collate = partial(segmentation_collate, ignore_index=0)
    return data


def open_depth(config: DataConfig) -> SplitCatalog:
    """The data set at `data.path`, of any kind."""
    return open_any(
        config,
        lambda: Generated(config, "depths", Labels(), OF_OTHERS),
        lambda: _DepthTable(config),
        lambda root: (_DepthFolder if described(root) else _FoundDepth)(config, root),
    )


class _DepthFolder(Folder):
    """A local folder of images, whose depth maps its metadata name."""

    def __init__(self, config: DataConfig, root: Path) -> None:
        super().__init__(config, root, need_masks=False)

    @property
    def labels(self) -> Labels:
        return Labels()

    def source(self, name: str) -> AnySource:
        keys = metadata_keys(self.root, self.folders[name])
        column = _column(self.config, [key.removesuffix(FILE_NAME) for key in keys if key != "file_name"], keys)
        rows, _, warnings = read_split(self.root, self.folders[name], self.config.image_column, column)
        self.warnings += warnings
        return _source(self.config, rows)


class _FoundDepth(FoundSet):
    """A local folder of images and depth maps of the same names."""

    def __init__(self, config: DataConfig, root: Path) -> None:
        super().__init__(config, root, "depths")

    @property
    def labels(self) -> Labels:
        return Labels()

    def source(self, name: str) -> AnySource:
        return _source(self.config, self.content(name).rows, announced=True)


def _source(config: DataConfig, rows: Rows, announced: bool = False) -> AnySource:
    told = {"no_mask": "it has no depth map", "called": "depth map"}
    source = FolderSource(rows, depth_decoder(config), masked=True, announced=announced, **told)
    return stream_of(source) if config.streaming and rows else source


class _DepthTable:
    """Parquet files, a saved data set or a Hub data set with a column of depth maps."""

    def __init__(self, config: DataConfig) -> None:
        self.opened = open_table(config, False)
        features: dict[str, Any] = dict(next(iter(self.opened.tables.values())).features or {})
        images = [name for name, feature in features.items() if holds_images(feature)]
        column = _column(config, images, images)
        self.opened.need_masks, self.opened.decoder = True, depth_decoder(config)
        self.opened.config = replace(config, mask_column=column)
        self.labels = Labels()
        self.warnings: list[str] = []

    def names(self) -> list[str]:
        return self.opened.names()

    def source(self, name: str) -> AnySource:
        return self.opened.source(name)


def _column(config: DataConfig, known: Sequence[str], listed: Sequence[str]) -> str:
    """The column with the depth maps, of the columns `known`; `listed` is for messages."""
    wanted = config.depth.column
    if wanted != "auto":
        return wanted
    others = [name for name in known if name not in (config.image_column, "image", "img", "mask", "masks", "label")]
    found = next((name for name in DEPTH_COLUMNS if name in known), others[0] if len(others) == 1 else None)
    if found is None:
        raise InputError(
            f"data.depth.column: expected a column of {config.path} with depth maps, got {list(listed)}; name it, "
            f"write metadata.jsonl with lines like {EXAMPLE}, or put them into depth/ beside images/"
        )
    return found
