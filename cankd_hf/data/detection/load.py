"""Loads detection data sets: imagefolder with `objects`, COCO json, and tables of the Hub or parquet."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import AnySource, ImageDataset, Sources
from cankd_hf.data.common.decode import Sample, make_decoder
from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.folders import described, read_split
from cankd_hf.data.common.labels import Labels, read_labels
from cankd_hf.data.common.opening import Folder, SplitCatalog, folder_at, open_set, without_meaning
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.common.sources import ROLES, ROWS, UNLABELLED, TaskData, by_role, find_split, split_of, wrap
from cankd_hf.data.common.streams import stream_of
from cankd_hf.data.common.tables import TableSource, is_table_path, labels_file, open_table
from cankd_hf.data.detection.annotated import AnnotatedSource, with_objects
from cankd_hf.data.detection.coco import CocoSplit, coco_files, read_coco
from cankd_hf.data.detection.collate import detection_collate
from cankd_hf.data.detection.generated import GeneratedObjects
from cankd_hf.data.detection.objects import (
    CATEGORY_KEYS,
    NO_AREA,
    OUTLINE_KEYS,
    Annotation,
    Categories,
    read_annotation,
)
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.data.detection.transforms import DetectionEvalTransform, DetectionTrainTransform
from cankd_hf.data.layouts.box_labels import renumbered
from cankd_hf.data.layouts.catalog import FoundSet
from cankd_hf.data.layouts.coco_json import ImagesOf
from cankd_hf.errors import InputError, together

logger = logging.getLogger(__name__)
LOOKED_AT = 1000  # rows of a stream among which a box is expected
EXAMPLE = '{"file_name": "a.jpg", "objects": {"bbox": [[10, 20, 30, 40]], "category": [0]}}'
EXAMPLE_MASKED = EXAMPLE.replace("}}", ', "segmentation": [[[10, 20, 40, 20, 25, 60]]]}}')


# What is left open in `data.strong`: of UBTv2 (2206.09500) and Dense Teacher (2207.02541), without mixing.
STRONG = {"jitter": [0.4, 0.4, 0.4, 0.1], "cutmix": 0.0, "erase": [0.7, 0.5, 0.3]}


@dataclass(kw_only=True)
class DetectionData(TaskData):
    """The data sets of a detection run; `labels` come from `detection_labels`, in training without crowds."""

    id2label: dict[int, str]  # names of the classes 0..K-1
    # the set's own id of each class, such as those of a COCO json, which may have gaps. The facts hold them too and,
    # if there are any, `dropped_boxes`
    category_ids: list[int]


def load_detection(
    config: DataConfig, need_labels: bool = True, splits: Sequence[str] = ROLES, seed: int = 0, masked: bool = False
) -> DetectionData:
    """Open, check and transform a detection set; the arguments are those of `load_segmentation`, and `masked`: each
    object has a mask, too.

    With `on_error: stop`, an image with an unusable box stops the run. With `skip` that box is left out, or the image
    if no box remains; what is left out is named and counted. Boxes without area are always left out, and counted.
    Unknown categories always stop. Raises InputError for a set that does not exist, lacks a split or class names,
    holds unusable images or boxes, or has a split without a single box.
    """
    config.check_values()
    catalog = open_objects(config, splits, masked) if need_labels else open_set(config, need_masks=False)
    catalog.warnings += without_meaning(
        config, "mask_column", "ignore_index", "reduce_labels", "soft_targets", "depth", where="boxes"
    )
    _, sources = together(
        lambda: catalog.labels.check_names(config, "cat") if need_labels else None,
        lambda: by_role(config, catalog, splits),
    )
    if config.unlabelled == ROWS and UNLABELLED in sources:
        source, train = sources["train"]
        sources["train"] = source, sorted({*train} - {*sources[UNLABELLED][1]})
    config = replace(config, strong=config.strong.filled(STRONG))
    empty = _check_annotations(config, sources) if need_labels else {}
    augment, evaluate = DetectionTrainTransform(config), DetectionEvalTransform(config)
    data = wrap(config, catalog, sources, need_labels, seed, augment, evaluate)
    if need_labels:
        _check_boxes(config, catalog, data)
    dropped = empty | data.facts.pop("dropped", {"files": {}})["files"]
    if dropped:
        data.facts["dropped_boxes"] = {"count": sum(map(len, dropped.values())), "files": dropped}
    areas = [text for texts in dropped.values() for text in texts if NO_AREA in text]
    if areas:
        what = "boxes or masks" if masked else "boxes"
        logger.warning("data: %d %s without area are dropped, first %s", len(areas), what, areas[0])
    id2label, category_ids = catalog.labels.id2label, catalog.labels.own_ids
    data.facts["category_ids"] = category_ids
    data.collate = detection_collate
    return DetectionData(**vars(data), id2label=id2label, category_ids=category_ids)


class _ObjectFolder(Folder):
    """A local folder with `objects` in its metadata."""

    def __init__(self, config: DataConfig, root: Path, masked: bool) -> None:
        super().__init__(config, root, need_masks=False)
        self.masked = masked

    @cached_property
    def labels(self) -> Labels:
        return read_labels(self.config, labels_file(self.config), masks=False)

    @cached_property
    def categories(self) -> Categories:
        return _categories(self.labels)

    def source(self, name: str) -> AnySource:
        config, folder = self.config, self.folders[name]
        column = "objects" if config.objects_column == "auto" else config.objects_column
        keep = (column, "image_id", "width", "height")
        rows, values, warnings = read_split(self.root, folder, config.image_column, None, keep)
        self.warnings += warnings
        unsaid = [number for number, line in enumerate(values) if line.get(column) is None]
        bare = [rows.names[number] for number in unsaid]
        if bare and not any(column in line for line in values):
            raise InputError(
                f"{folder}: expected metadata.jsonl with the key {column!r} for each image, like "
                f"{EXAMPLE_MASKED if self.masked else EXAMPLE}, got none "
                f"for {len(bare)} of {len(rows)} images, first {bare[0]}; or name COCO json files in data.annotations"
            )
        if bare and config.unlabelled != ROWS:
            self.warnings.append(
                f"{len(bare)} of {len(rows)} images of {folder.name} have no {column}, first {bare[0]}; they count as "
                "images without a box"
            )
        annotations = AnnotationTable.of(
            _read_row(config, self.categories, column, line, number, rows.names[number], self.masked)
            for number, line in enumerate(values)
        )
        return _annotated(config, rows, annotations, self.labels, unsaid, self.masked)


class _Coco:
    """A local folder of images with COCO json files."""

    def __init__(
        self, config: DataConfig, root: Path, files: dict[str, Path], roles: Sequence[str], masked: bool
    ) -> None:
        if config.labels is not None:
            raise InputError(f"data.labels: expected null with COCO json, which names classes, got {config.labels}")
        self.root, self.config, self.files, self.masked = root, config, files, masked
        self.warnings: list[str] = []
        named = [find_split(name, list(files)) for role in roles if (name := split_of(config, role)) is not None]
        first = next((name for name in named if name), next(iter(files)))
        self._read: dict[str, CocoSplit] = {}
        self.categories = self._split(first).categories
        self.labels = read_labels(config, None, list(self.categories.values()), masks=False)
        self.labels.ids = list(self.categories)

    def names(self) -> list[str]:
        return list(self.files)

    def source(self, name: str) -> AnySource:
        content = self._split(name)
        if content.categories != self.categories:
            odd = sorted(set(content.categories.items()) ^ set(self.categories.items()))
            raise InputError(f"{self.files[name]}: expected the categories of the other splits, got others: {odd[:6]}")
        self.warnings += content.warnings
        empty = np.flatnonzero(np.diff(content.annotations.ends) == 0).tolist()
        return _annotated(self.config, content.rows, content.annotations, self.labels, empty, self.masked)

    def _split(self, name: str) -> CocoSplit:
        if name not in self._read:
            skip = self.config.on_error == "skip"
            file = self.files[name].relative_to(self.root).as_posix()
            locate = partial(ImagesOf(self.root).locate, file, name)
            self._read[name] = read_coco(self.root, name, self.files[name], skip, locate, masked=self.masked)
        return self._read[name]


class _FoundObjects(FoundSet):
    """A set with boxes, or with masks of objects, as it was found in a folder."""

    def source(self, name: str) -> AnySource:
        content = self.content(name)
        assert content.objects is not None  # a layout with boxes reads them
        objects = renumbered(content.objects, self.found, self.labels)
        return _annotated(self.config, content.rows, objects, self.labels, content.bare, self.need == "instances")


class _ObjectTable:
    """Parquet files, a saved data set or a Hub data set with a column of objects."""

    def __init__(self, config: DataConfig, masked: bool) -> None:
        self.config, self.masked = config, masked
        self.opened = open_table(config, False)
        self.warnings: list[str] = []
        features = dict(next(iter(self.opened.tables.values())).features or {})
        self.column = "objects" if config.objects_column == "auto" else config.objects_column
        if self.column not in features:
            raise InputError(
                f"data.objects_column: expected a column of {config.path}, which has {list(features)}, "
                f"got {self.column!r}; name the one with the boxes"
            )
        if masked and not any(key in str(features[self.column]) for key in OUTLINE_KEYS):
            raise InputError(_no_mask(config))
        self.labels = read_labels(config, labels_file(config), _class_names(features[self.column]), False)
        self.categories = _categories(self.labels)

    def names(self) -> list[str]:
        return self.opened.names()

    def source(self, name: str) -> AnySource:
        config, columns = self.config, self.opened.tables[name].features or {}
        beside = [key for key in ("image_id", "width", "height") if key in columns]
        if config.streaming:
            rows = self.opened.tables[name].select_columns([self.column, *beside])
            if not _any_box(self.notes(rows.take(LOOKED_AT))):
                raise InputError(_no_box(config, name))
        label = partial(_label_row, config, self.categories, self.column, self.masked)
        return self.opened.source(name, [self.column, *beside], label)

    def notes(self, rows: Iterable[dict[str, Any]]) -> Iterator[Annotation]:
        """The objects in rows whose images are not read."""
        return (_read_row(self.config, self.categories, self.column, row, 0, "row", self.masked) for row in rows)


def open_objects(config: DataConfig, roles: Sequence[str], masked: bool = False) -> SplitCatalog:
    """The data set at `data.path`, whatever kind it is; `masked`: each object has a mask, too."""
    path = str(config.path)
    if path == "shapes":
        return GeneratedObjects(config, masked)
    if is_table_path(path) or not os.path.lexists(path):
        return _ObjectTable(config, masked)
    root = folder_at(path)
    files = {} if config.annotations == "auto" and described(root) else coco_files(root, config.annotations)
    if files and (config.annotations != "auto" or find_split(config.train_split, list(files)) is not None):
        return _Coco(config, root, files, roles, masked)
    need = "instances" if masked else "boxes"
    return _ObjectFolder(config, root, masked) if described(root) else _FoundObjects(config, root, need)


def _annotated(
    config: DataConfig, rows: Rows, annotations: AnnotationTable, labels: Labels, bare: Sequence[int], masked: bool
) -> AnySource:
    if masked and annotations.odd and not any(note.outlines for note in annotations):
        raise InputError(_no_mask(config))
    source = AnnotatedSource(rows, make_decoder(config, labels), annotations, config.on_error == "skip", bare=bare)
    if not config.streaming or not rows:
        return source
    _check_annotations(config, {"": (source, range(len(rows)))})
    if not _any_box(annotations):
        raise InputError(_no_box(config, f"the split of {rows[0].name}"))
    return stream_of(source)


def _read_row(
    config: DataConfig,
    categories: Categories,
    column: str,
    values: dict[str, Any],
    number: int,
    name: str,
    masked: bool,
) -> Annotation:
    """The objects in a line of metadata or a row of a table."""
    width, height, image_id = (values.get(key) for key in ("width", "height", "image_id"))
    size = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    image_id = image_id if isinstance(image_id, int) and 0 <= image_id < 2**63 else number
    return read_annotation(values.get(column), name, categories, config.box_format, image_id, size, masked)


def _label_row(
    config: DataConfig,
    categories: Categories,
    column: str,
    masked: bool,
    sample: Sample,
    row: dict[str, Any],
    number: int,
) -> Sample:
    """A sample of a table with the objects of its row."""
    annotation = _read_row(config, categories, column, row, number, sample.name, masked)
    return with_objects(sample, annotation, config.on_error == "skip")


def _check_annotations(config: DataConfig, sources: Sources) -> dict[str, list[str]]:
    """Report all box problems of the images to be used, before any image is decoded; returns the boxes without area by
    file."""
    problems: list[str] = []
    empty: dict[str, list[str]] = {}
    for source, indices in sources.values():
        if isinstance(source, AnnotatedSource):
            for index, annotation in source.annotations.odd_ones(indices):
                problems += [*annotation.wrong, *(() if config.on_error == "skip" else annotation.faults)]
                if annotation.empty:
                    empty[source.name(index)] = list(annotation.empty)
    if problems:
        raise InputError(shortened(problems))
    return empty


def _check_boxes(config: DataConfig, catalog: SplitCatalog, data: TaskData) -> None:
    """Raises InputError for a split without a single box in its images: nothing can be learned or scored there."""
    problems = []
    for role in ROLES:
        split = getattr(data, role)
        source = split.source if isinstance(split, ImageDataset) else None
        notes: Iterable[Annotation] | None = None  # of generated objects nothing is to be found out
        if isinstance(source, AnnotatedSource):
            notes = (source.annotations[index] for index in split.indices)
        elif isinstance(source, TableSource) and isinstance(catalog, _ObjectTable):
            beside = [name for name in source.table.column_names if name not in source.columns]
            notes = catalog.notes(source.table.select_columns(beside).select(split.indices))
        if notes is not None and not _any_box(notes):
            problems.append(_no_box(config, repr(split_of(config, role)), f"data.{role}_split: "))
    if problems:
        raise InputError(problems)


def _no_mask(config: DataConfig) -> str:
    what = "add a `segmentation` to each object, or take a recipe with task: detection"
    return f"data: expected objects with masks in {config.path}, got boxes alone; {what}"


def _any_box(annotations: Iterable[Annotation]) -> bool:
    """Whether there is a box of a single object."""
    return any((annotation.iscrowd == 0).any() for annotation in annotations)


def _no_box(config: DataConfig, split: str, place: str = "data: ") -> str:
    what = "there is nothing to learn or to score in it; correct the annotations, or name another split"
    return f"{place}expected at least 1 box in {split} of {config.path}, got none: {what}"


def _categories(labels: Labels) -> Categories:
    """The set's own ids and names of a class -> the class."""
    return {key: index for index, own in enumerate(labels.own_ids) for key in (own, labels.id2label[index])}


def _class_names(feature: Any) -> list[str] | None:
    """Class names in the feature of the objects, if any."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if isinstance(feature, dict):
        return next((_class_names(feature[key]) for key in CATEGORY_KEYS if key in feature), None)
    inner = getattr(feature, "feature", None)
    return None if inner is None else _class_names(inner)
