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
from cankd_hf.data.layouts.base import Content
from cankd_hf.data.layouts.drawn import DrawnSource


class FoundSet:
    """The splits that `look` finds in a folder, with their masks if they are needed."""

    def __init__(self, config: DataConfig, root: Path, need: str | None) -> None:
        self.found = look(root, need)
        self.config, self.masked = config, need == "masks"
        self.warnings = list(self.found.notes)

    @cached_property
    def labels(self) -> Labels:
        """Its classes: those of a labels file, else those of the data."""
        file = labels_file(self.config) or labels_file(replace(self.config, path=str(self.found.root)))
        if file is not None and file == self.found.root / self.found.label_source:
            file = None  # class names in another form, such as the labels.json of FiftyOne, which is COCO json
        if file is not None or self.found.labels is None:
            return read_labels(self.config, file, masks=self.masked)
        return self.found.labels

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
        content = self.content(name)
        rows, decoder = content.rows, make_decoder(self.config, self.labels)
        source = FolderSource(rows, decoder, masked=self.masked)
        if self.masked and content.drawn is not None:
            source = DrawnSource(rows, decoder, content.drawn)
        return stream_of(source) if self.config.streaming and rows else source
