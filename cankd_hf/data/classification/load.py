"""Loads data sets of images with one class each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cankd_hf.config.data import STRONG, DataConfig
from cankd_hf.data.classification.transforms import ClassEvalTransform, ClassTrainTransform, classification_collate
from cankd_hf.data.common.dataset import AnySource
from cankd_hf.data.common.decode import Sample, Unlabelled, WrongLabels, make_decoder
from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.folders import FolderSource, described, metadata_keys, read_split
from cankd_hf.data.common.labels import Labels, read_labels
from cankd_hf.data.common.opening import Folder, Generated, SplitCatalog, open_any, without_meaning
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.common.sources import ROLES, TaskData, by_role, wrap
from cankd_hf.data.common.streams import stream_of
from cankd_hf.data.common.tables import labels_file, open_table
from cankd_hf.data.common.targets import ClassId
from cankd_hf.data.generated import SHAPE_CLASSES
from cankd_hf.data.layouts.catalog import FoundSet
from cankd_hf.errors import InputError, together

LABEL_COLUMNS = ["label", "labels", "class", "category", "fine_label", "target", "class_name"]
OF_MASKS = (
    *("mask_column", "objects_column", "annotations", "box_format", "ignore_index", "reduce_labels", "soft_targets"),
    *("keep_aspect", "depth"),
)
EXAMPLE = '{"file_name": "a.jpg", "label": "cat"}'


@dataclass(kw_only=True)
class ClassificationData(TaskData):
    """The data sets of a classification run; `labels` are int64 []."""

    id2label: dict[int, str]  # names of the classes 0..K-1


def load_classification(config: DataConfig, splits: Sequence[str] = ROLES, seed: int = 0) -> ClassificationData:
    """Open, check and transform a set of images with one class each; the arguments are those of `load_segmentation`.

    Raises InputError for a set that does not exist, lacks a split or class names, or holds unusable images (only
    entirely unusable splits with `on_error: skip`).
    """
    config.check_values()
    if config.strong.cutmix:
        raise InputError(
            f"data.strong.cutmix: expected 0, as an image of two classes has no label of its own, got "
            f"{config.strong.cutmix:g}"
        )
    config = replace(config, strong=config.strong.filled({**STRONG, "cutmix": 0.0}))
    catalog = open_classes(config)
    catalog.warnings += without_meaning(config, *OF_MASKS, where="a class for each image")
    _, sources = together(lambda: catalog.labels.check_names(config, "cat"), lambda: by_role(config, catalog, splits))
    data = wrap(config, catalog, sources, True, seed, ClassTrainTransform(config), ClassEvalTransform(config))
    data.collate = classification_collate
    return ClassificationData(**vars(data), id2label=catalog.labels.id2label)


def open_classes(config: DataConfig) -> SplitCatalog:
    """The data set at `data.path`, of any kind."""
    shapes = Labels({key - 1: name for key, name in SHAPE_CLASSES.items() if key})
    return open_any(
        config,
        lambda: Generated(config, "classes", shapes, OF_MASKS),
        lambda: _ClassTable(config),
        lambda root: (_ClassFolder if described(root) else _FoundClasses)(config, root),
    )


@dataclass(eq=False)
class ClassSource(FolderSource):
    """Images of a folder, each with the number of its class; -1 for one without."""

    classes: Sequence[int]
    called: str = field(default="class", kw_only=True)

    def load(self, index: int) -> Sample:
        label = self.classes[index]
        if label < 0:
            raise Unlabelled(f"{self.name(index)}: the metadata give it no class")
        return super().load(index)._replace(target=ClassId(label))

    def without_labels(self) -> tuple[FolderSource, list[int]]:
        return self.alone(), [index for index, label in enumerate(self.classes) if label < 0]


class _FoundClasses(FoundSet):
    """A local folder with a folder of images for each class."""

    def __init__(self, config: DataConfig, root: Path) -> None:
        super().__init__(config, root, "classes")

    def source(self, name: str) -> AnySource:
        content = self.content(name)
        # a labels file may name the classes in another order than their folders
        names = {label: number for number, label in self.labels.id2label.items()}
        folders = self.found.labels.id2label if self.found.labels is not None else {}
        if missing := [label for label in folders.values() if label not in names]:
            listed = ", ".join(shortened(missing))
            raise InputError(f"data.labels: expected the names of the folders, got none for {listed}; add them")
        return _source(self.config, content.rows, [names[folders[number]] for number in content.classes or ()])


class _ClassFolder(Folder):
    """A local folder with a class for each image in its metadata."""

    def __init__(self, config: DataConfig, root: Path) -> None:
        super().__init__(config, root, need_masks=False)

    @cached_property
    def labels(self) -> Labels:  # type: ignore[override]
        known = read_labels(self.config, labels_file(self.config), masks=False)
        if known.id2label:
            return known
        # of the training split: a class that only another one has could not be learned
        values = {label for folder in self.folders.values() for label in self._read(folder)[1] if label is not None}
        return Labels(dict(enumerate(_names_of(values, self.root))))

    def source(self, name: str) -> AnySource:
        rows, values, warnings = self._read(self.folders[name])
        self.warnings += warnings
        classes, problems = list[int](), list[str]()
        for index, value in enumerate(values):
            try:
                classes.append(_number(value, self.labels, rows.names[index]))
            except WrongLabels as error:
                problems += error.problems
        if problems:
            raise InputError(shortened(problems))
        return _source(self.config, rows, classes)

    def _read(self, folder: Path) -> tuple[Rows, list[Any], list[str]]:
        keys = metadata_keys(self.root, folder)
        column = next((name for name in LABEL_COLUMNS if name in keys), None)
        if column is None:
            raise InputError(f"{folder}: expected metadata with lines like {EXAMPLE}, got the keys {keys}")
        rows, values, warnings = read_split(self.root, folder, self.config.image_column, None, [column])
        return rows, [None if line.get(column) in (None, "") else line[column] for line in values], warnings


class _ClassTable:
    """Parquet files, a saved data set or a Hub data set with a column of classes."""

    def __init__(self, config: DataConfig) -> None:
        from datasets import ClassLabel

        self.config, self.opened = config, open_table(config, False)
        self.warnings: list[str] = []
        features: dict[str, Any] = dict(next(iter(self.opened.tables.values())).features or {})
        named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        usual = [name for name in LABEL_COLUMNS if name in features]
        self.column = next(iter([*(name for name in usual if name in named), *named, *usual]), "")
        if not self.column:
            raise InputError(
                f"data.path: expected a column with the class of each image, such as label, in {config.path}, got "
                f"{list(features)}"
            )
        feature = features[self.column]
        names = list(feature.names) if isinstance(feature, ClassLabel) else None
        self.labels = read_labels(config, labels_file(config), names, masks=False)
        if not self.labels.id2label and not config.streaming:
            values = {value for table in self.opened.tables.values() for value in table.unique(self.column)}
            self.labels = Labels(dict(enumerate(_names_of(values - {None}, Path(str(config.path))))))

    def names(self) -> list[str]:
        return self.opened.names()

    def source(self, name: str) -> AnySource:
        return self.opened.source(name, [self.column], partial(_label_row, self.labels, self.column))


def _source(config: DataConfig, rows: Rows, classes: Sequence[int]) -> AnySource:
    source = ClassSource(rows, make_decoder(config, Labels()), classes)
    return stream_of(source) if config.streaming and rows else source


def _names_of(values: set[Any], place: Path) -> list[str]:
    """Names for the classes of a set that nobody named: texts sorted, numbers from 0 to the largest."""
    numbers = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    if len(numbers) == len(values) and numbers:
        if min(numbers) < 0 or max(numbers) >= 2 * len(numbers) + 10:
            raise InputError(f"data.labels: expected classes 0..K-1 in {place}, got {sorted(numbers)[:8]}; name them")
        return [f"class_{number}" for number in range(max(numbers) + 1)]
    return sorted(str(value) for value in values)


def _number(value: Any, labels: Labels, name: str) -> int:
    """The number 0..K-1 of a class that is given by its id or its name; -1 for none. Raises WrongLabels for others."""
    if value is None:
        return -1
    if isinstance(value, int) and not isinstance(value, bool) and value in labels.own_ids:
        return labels.own_ids.index(value)
    for number, known in labels.id2label.items():
        if known == str(value):
            return number
    if isinstance(value, str) and value.isdigit() and int(value) in labels.own_ids:  # of a csv file
        return labels.own_ids.index(int(value))
    listed = ", ".join(list(labels.id2label.values())[:8])
    raise WrongLabels(f"{name}: expected a class of the set ({listed}), got {value!r}; correct it, or name the class")


def _label_row(labels: Labels, column: str, sample: Sample, row: dict[str, Any], number: int) -> Sample:
    """A sample of a table with the class of its row; -1 is none, as in sets whose test labels are kept secret."""
    label = -1 if row[column] == -1 else _number(row[column], labels, sample.name)
    if label < 0:
        raise Unlabelled(f"{sample.name}: the table gives it no class")
    return sample._replace(target=ClassId(label))
