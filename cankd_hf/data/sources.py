"""From a `data:` section to data sets: folder, parquet, Hub, stream or generated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cankd_hf.data.checks import Report, preflight
from cankd_hf.data.collate import SegmentationCollator
from cankd_hf.data.config import DataConfig
from cankd_hf.data.dataset import ImageDataset, Source, Transform
from cankd_hf.data.decode import Decoder
from cankd_hf.data.folders import SPLIT_NAMES, FolderSource, read_split, slice_of, split_folders
from cankd_hf.data.labels import Labels, read_labels
from cankd_hf.data.shapes import SHAPE_CLASSES, SHAPE_PALETTE, generated_splits
from cankd_hf.data.streams import StreamDataset, StreamSource, stream_of
from cankd_hf.data.tables import is_table_path, open_table
from cankd_hf.data.transforms import EvalTransform, TrainTransform
from cankd_hf.errors import InputError

__all__ = ["ROLES", "DataConfig", "ImageData", "SegmentationData", "load_images", "load_segmentation"]

logger = logging.getLogger(__name__)
ROLES = ("train", "eval", "test")
AnyDataset = ImageDataset | StreamDataset


@dataclass
class SegmentationData:
    """The data sets of a segmentation run.

    Attributes:
        train: items with `pixel_values` [3, h, w] and `labels` [h, w], augmented.
        eval: items at `image_size`, the labels at the size of each mask; None without such a split.
        test: the same for the final table.
        id2label: names of the classes 0..K-1.
        ignore_index: label that counts in no loss and no score.
        palette: a colour for each class.
        facts: plain data for reports and cards: source, splits, skipped, warnings, class names.
    """

    train: AnyDataset | None
    eval: AnyDataset | None
    test: AnyDataset | None
    id2label: dict[int, str]
    ignore_index: int
    palette: dict[int, tuple[int, int, int]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def collate(self) -> SegmentationCollator:
        """The collator that pads with this set's void label."""
        return SegmentationCollator(self.ignore_index)


@dataclass
class ImageData:
    """The data sets of a label-free run: items hold `pixel_values` alone; `facts` as in `SegmentationData`."""

    train: AnyDataset | None
    eval: AnyDataset | None
    test: AnyDataset | None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def collate(self) -> SegmentationCollator:
        """The collator; it pads images only."""
        return SegmentationCollator()


class Opened(Protocol):
    """A data set whose splits can be asked for by name."""

    labels: Labels
    warnings: list[str]

    def names(self) -> list[str]:
        """Splits that exist."""

    def source(self, name: str) -> Source | StreamSource:
        """One of them."""


def load_segmentation(
    config: DataConfig, need_labels: bool = True, splits: Sequence[str] = ROLES, seed: int = 0
) -> SegmentationData:
    """Open, check and wrap a segmentation set.

    Args:
        config: the `data:` section.
        need_labels: False: masks are not read, items hold `pixel_values` alone.
        splits: which of train, eval, test to load.
        seed: of the shuffle of a stream.

    Raises:
        InputError: for a set that does not exist, lacks a split or class names, or holds unusable images or masks
            (only the wholly broken ones with `on_error: skip`).
    """
    config.check_values()
    opened = open_set(config, need_masks=need_labels)
    if need_labels and not opened.labels.id2label:
        raise InputError(
            f"data.labels: expected the class names of {config.path}, found none; name a json file like "
            '{"id2label": {"0": "sky", ...}} under data.labels, or give data.num_labels'
        )
    sources = by_role(config, opened, splits)
    loaded, facts = wrap(config, opened, sources, need_labels, seed)
    return SegmentationData(
        loaded["train"],
        loaded["eval"],
        loaded["test"],
        opened.labels.id2label,
        opened.labels.ignore_index,
        opened.labels.colours(),
        facts,
    )


def load_images(config: DataConfig, splits: Sequence[str] = ROLES, seed: int = 0) -> ImageData:
    """Open, check and wrap any set of images, labels or not, for label-free distillation.

    Without a validation split, every n-th training image is held out, so that about `config.holdout` of them are.

    Raises:
        InputError: for a set that does not exist or holds unusable images (see `load_segmentation`).
    """
    config.check_values()
    opened = open_set(config, need_masks=False)
    wanted = config.eval_split
    lacking = wanted is None or find_split(wanted, opened.names()) is None
    sources = by_role(config, opened, [role for role in splits if not (role == "eval" and lacking)])
    if "eval" in splits and lacking:
        train = sources.get("train") or by_role(config, opened, ["train"])["train"]
        if isinstance(train[0], StreamSource):
            raise InputError("data.eval_split: a stream cannot be parted; name a split for validation")
        every = max(2, round(1 / config.holdout))
        if len(train[1]) < 2:
            raise InputError(f"data: expected at least 2 images to hold one out for validation, got {len(train[1])}")
        sources["eval"] = (train[0], train[1][::every])
        if "train" in splits:
            held = set(sources["eval"][1])
            sources["train"] = (train[0], [index for index in train[1] if index not in held])
    loaded, facts = wrap(config, opened, sources, False, seed)
    return ImageData(loaded["train"], loaded["eval"], loaded["test"], facts)


class Folder:
    """A local folder of images, with masks if they are wanted."""

    def __init__(self, config: DataConfig, root: Path, need_masks: bool) -> None:
        self.root = root
        self.config = config
        self.folders = split_folders(root)
        self.mask_column = config.mask_column if need_masks else None
        file = Path(config.labels) if config.labels else root / "labels.json"
        if config.labels and not file.is_file() and (root / config.labels).is_file():
            file = root / config.labels
        wanted = need_masks and (config.labels is not None or file.is_file())
        self.labels = read_labels(config, file if wanted else None)
        self.warnings: list[str] = []

    def names(self) -> list[str]:
        """Splits that exist."""
        return list(self.folders)

    def source(self, name: str) -> Source | StreamSource:
        """One of them."""
        rows, warnings = read_split(self.root, self.folders[name], self.config.image_column, self.mask_column)
        self.warnings += warnings
        source = FolderSource(rows, make_decoder(self.config, self.labels))
        return stream_of(source) if self.config.streaming and rows else source


class _Shapes:
    """The generated set."""

    def __init__(self, config: DataConfig, need_masks: bool) -> None:
        self.splits = generated_splits(config.generated, need_masks)
        self.labels = Labels(id2label=dict(SHAPE_CLASSES), palette=dict(SHAPE_PALETTE))
        self.warnings: list[str] = []

    def names(self) -> list[str]:
        return list(self.splits)

    def source(self, name: str) -> Source:
        return self.splits[name]


def make_decoder(config: DataConfig, labels: Labels) -> Decoder:
    """The decoder a set needs."""
    num_labels = len(labels.id2label) or None
    return Decoder(config.max_pixels, labels.ignore_index, labels.reduce_labels, labels.palette, num_labels)


def open_set(config: DataConfig, need_masks: bool) -> Opened:
    """Find out what `data.path` is."""
    path = str(config.path)
    if path == "shapes":
        return _Shapes(config, need_masks)
    if is_table_path(path) or not Path(path).exists():
        return open_table(config, need_masks, make_decoder)
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"data.path: expected a folder, a parquet file or a Hub id, got the file {path}")
    return Folder(config, root, need_masks)


def find_split(wanted: str, names: Sequence[str]) -> str | None:
    """The split that is meant by a name: itself, or one that means the same."""
    name = slice_of(wanted, 0)[0]
    if name in names:
        return name
    meaning = SPLIT_NAMES.get(name.lower(), name)
    return next((other for other in names if SPLIT_NAMES.get(other.lower(), other) == meaning), None)


def by_role(
    config: DataConfig, opened: Opened, roles: Sequence[str]
) -> dict[str, tuple[Source | StreamSource, Sequence[int]]]:
    """Source and indices of each role that the recipe names; all missing splits in one error."""
    names = opened.names()
    result: dict[str, tuple[Source | StreamSource, Sequence[int]]] = {}
    problems = []
    for role in roles:
        wanted = {"train": config.train_split, "eval": config.eval_split, "test": config.test_split}[role]
        if wanted is None:
            if len(roles) == 1:
                problems.append(f"data.{role}_split: expected a split of {config.path}, which has {names}; got none")
            continue
        name = find_split(wanted, names)
        if name is None:
            hint = "; set it to null to go without" if role != "train" else ""
            listed = ", ".join(names)
            problems.append(f"data.{role}_split: expected a split of {config.path} ({listed}), got {wanted!r}{hint}")
            continue
        source = opened.source(name)
        if isinstance(source, StreamSource):
            result[role] = (source, range(0))
            continue
        limit = config.max_train_samples if role == "train" else config.max_eval_samples
        indices = slice_of(wanted, len(source))[1][:limit]
        if not len(indices):
            problems.append(f"data.{role}_split: expected at least 1 image in {wanted!r} of {config.path}, got none")
        result[role] = (source, indices)
    if problems:
        raise InputError(problems)
    return result


def wrap(
    config: DataConfig,
    opened: Opened,
    sources: dict[str, tuple[Source | StreamSource, Sequence[int]]],
    labelled: bool,
    seed: int,
    transforms: Callable[[str], Transform] | None = None,
) -> tuple[dict[str, AnyDataset | None], dict[str, Any]]:
    """Check the sources and put transforms on them.

    Args:
        config: the `data:` section.
        opened: the data set.
        sources: as `by_role` gives them.
        labelled: whether labels are wanted.
        seed: of the shuffle of a stream.
        transforms: role -> transform; default: those of images and masks.

    Returns:
        role -> data set, and facts for reports and cards.

    Raises:
        InputError: as `preflight` does.
    """
    ignore_index = opened.labels.ignore_index
    report = preflight(
        config,
        {
            role: (source, indices)
            for role, (source, indices) in sources.items()
            if not isinstance(source, StreamSource)
        },
        opened.labels.id2label if labelled else None,
        ignore_index,
    )
    noticed = list(dict.fromkeys(opened.warnings))  # two slices of one split notice the same
    for warning in noticed:
        logger.warning("data: %s", warning)
    loaded: dict[str, AnyDataset | None] = dict.fromkeys(ROLES)
    for role, (source, _) in sources.items():
        transform: Transform
        if transforms is not None:
            transform = transforms(role)
        else:
            transform = TrainTransform(config, ignore_index) if role == "train" else EvalTransform(config)
        if isinstance(source, StreamSource):
            limit = config.max_train_samples if role == "train" else config.max_eval_samples
            shuffle = config.shuffle_buffer if role == "train" else 0
            loaded[role] = StreamDataset(source, transform, shuffle, limit, config.on_error, seed)
            continue
        indices = report.usable[role]
        loaded[role] = ImageDataset(source, transform, indices, config.cache, config.on_error, ignore_index)
    return loaded, _facts(config, opened, loaded, report, noticed)


def _facts(
    config: DataConfig, opened: Opened, loaded: dict[str, AnyDataset | None], report: Report, noticed: list[str]
) -> dict[str, Any]:
    """Plain data for reports and cards."""
    facts = {
        "source": config.path,
        "revision": config.revision,
        "streaming": config.streaming,
        "classes": list(opened.labels.id2label.values()),
        "splits": {
            role: len(dataset) if isinstance(dataset, ImageDataset) else None
            for role, dataset in loaded.items()
            if dataset is not None
        },
        "checked": report.checked,
        "skipped": {"count": len(report.skipped), "files": report.skipped},
        "warnings": noticed + report.warnings,
    }
    if report.dropped:
        facts["dropped_boxes"] = {"count": sum(map(len, report.dropped.values())), "files": report.dropped}
    return facts
