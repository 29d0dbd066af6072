"""A set that was found in a folder, opened for the loaders of the tasks."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import AnySource
from cankd_hf.data.common.decode import make_decoder
from cankd_hf.data.common.folders import FolderSource
from cankd_hf.data.common.labels import Labels, read_labels
from cankd_hf.data.common.streams import stream_of
from cankd_hf.data.common.tables import labels_file
from cankd_hf.data.layouts import look
from cankd_hf.data.layouts.base import Content, Found, Tree
from cankd_hf.data.layouts.box_labels import box_labels, drawn_labels
from cankd_hf.data.layouts.classes import checked, classes_of
from cankd_hf.data.layouts.coco import CocoJson
from cankd_hf.data.layouts.coco_json import is_coco
from cankd_hf.data.layouts.drawn import DrawnSource
from cankd_hf.errors import InputError, together


class FoundSet:
    """The splits that `look` finds in a folder, with their masks if they are needed."""

    def __init__(self, config: DataConfig, root: Path, need: str) -> None:
        self.config, self.root, self.need = config, root, need
        self.warnings: list[str] = []

    @cached_property
    def found(self) -> Found:
        """What was found; looked for when it is asked for, so that its problems are told with others."""
        named = self.need == "masks" and self.config.annotations != "auto"
        found = _named(self.root, self.config.annotations) if named else look(self.root, self.need)
        self.warnings += found.notes
        return found

    @cached_property
    def labels(self) -> Labels:
        """Its classes: those of a labels file, else those of the data, else those counted in its masks."""
        if self.need == "images":
            return read_labels(self.config, None)
        masks = self.need == "masks"
        together(lambda: read_labels(self.config, _labels_file(self.config), masks=masks), lambda: self.found)
        labels, notes = labels_of(self.found, self.config, self.need)
        self.warnings += notes
        return labels

    def names(self) -> list[str]:
        """Its splits."""
        return list(self.found.splits)

    def content(self, name: str) -> Content:
        """One split, read; its notes are told."""
        content = self.found.splits[name].content
        self.warnings += content.notes
        return content

    def source(self, name: str) -> AnySource:
        """The samples of one split."""
        content, masked = self.content(name), self.need == "masks"
        # without masks there is nothing to decode by classes, which to count might take long
        labels = self.labels if masked else Labels()
        rows, decoder = content.rows, make_decoder(self.config, labels)
        source = FolderSource(rows, decoder, masked=masked, no_mask="there is no mask of its name", announced=True)
        if masked and content.drawn is not None:
            source = DrawnSource(rows, decoder, content.drawn)
        return stream_of(source) if self.config.streaming and rows else source


def labels_of(found: Found, config: DataConfig, need: str) -> tuple[Labels, list[str]]:
    """The classes of a set, and what to tell of them: those of a labels file and of `data.num_labels`, else those of
    the data, else, of masks, those that are counted in them.

    Args:
        found: the set.
        config: the `data:` section.
        need: what is needed of it, of `KINDS`.

    Raises:
        InputError: for a labels file that cannot be read, and for settings and files that contradict each other.
    """
    file = _labels_file(config) or _labels_file(replace(config, path=str(found.root)))
    known = read_labels(config, file, masks=need == "masks")
    if need == "boxes":
        return box_labels(found, known)
    if need != "masks":
        return (known if known.id2label else found.labels or known), []
    if "boxes" in found.kinds:
        return drawn_labels(found, known)
    own = found.labels
    if own is None and not known.id2label:
        return classes_of(found, config)
    if own is None:
        return checked(found, known, config)
    if known.reduce_labels and (own.values or own.codes):
        raise InputError(f"data.reduce_labels: expected false, as {found.label_source} says what masks hold, got true")
    if known.id2label and (len(known.id2label) != len(own.id2label) or known.values or known.codes):
        if config.num_labels is not None and len(known.id2label) == config.num_labels != len(own.id2label):
            raise InputError(
                f"data.num_labels: expected {len(own.id2label)}, the classes of {found.label_source}, got "
                f"{config.num_labels}; drop it, or name other classes in data.labels"
            )
        return checked(found, known, config)
    generic = all(name == f"class_{label}" for label, name in known.id2label.items())
    return replace(
        own,
        id2label=own.id2label if generic else known.id2label,
        palette=known.palette or own.palette,
        ignore_index=known.ignore_index,
        reduce_labels=own.reduce_labels or known.reduce_labels,
    ), []


def _labels_file(config: DataConfig) -> Path | None:
    """The labels file, if any; the `labels.json` of FiftyOne is none, but COCO json."""
    file = labels_file(config)
    return None if file is not None and config.labels is None and is_coco(file) else file


def _named(root: Path, annotations: str) -> Found:
    """The set of the COCO json files that `data.annotations` names, whose outlines are drawn as masks."""
    found = CocoJson(annotations).find(Tree(root), "masks")
    if found is None or "masks" not in found.kinds:
        said = f"boxes alone in {root / annotations}"
        raise InputError(f"data.annotations: expected COCO json with outlines, got {said}")
    return found
