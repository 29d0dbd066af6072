"""COCO json, of any name and in any place of a folder: boxes, masks of objects, and masks drawn from its outlines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cankd_hf.data.common.files import shortened
from cankd_hf.data.common.labels import Labels
from cankd_hf.data.detection.coco import CocoSplit, coco_files, read_coco
from cankd_hf.data.layouts.base import Content, Found, Split, Tree, canonical, ordered
from cankd_hf.data.layouts.coco_json import ImagesOf, class_names, coco_files_of, count_images, has_outlines
from cankd_hf.data.layouts.drawn import VOID, DrawnMasks
from cankd_hf.errors import InputError

BACKGROUND = "background"


class CocoJson:
    """The layout of COCO, and of exports of CVAT, FiftyOne, Label Studio and Roboflow."""

    name = "COCO json"

    def __init__(self, annotations: str = "auto") -> None:
        self.annotations = annotations  # as `data.annotations`

    def find(self, tree: Tree, need: str | None) -> Found | None:
        if self.annotations == "auto":
            files, notes = coco_files_of(tree, need)
        else:
            named, notes = coco_files(tree.root, self.annotations), []
            files = {canonical(name): file.relative_to(tree.root).as_posix() for name, file in named.items()}
        if not files:
            return None
        if problems := tree.refuse_links(list(files.values())):
            raise InputError(shortened(problems))
        if not tree.images:
            raise InputError(f"{tree.root}: expected the images of {', '.join(files.values())}, got none")
        reading = _Reading(tree, files, need == "masks", need == "instances")
        outlined = any(has_outlines(tree, file) for file in files.values())
        splits = {
            split: Split(count_images(tree, file), partial(reading.read, split)) for split, file in files.items()
        }
        first = next(iter(ordered(splits)))
        categories = class_names(tree, files[first]) or reading.file(first).categories
        labels = Labels(dict(enumerate(categories.values())), ids=list(categories))
        if need == "masks" and outlined:
            stuff = files[first].rpartition("/")[2].lower().startswith("stuff")
            labels, reading.fill = mask_labels(list(categories.values()), void=stuff)
            reading.shift = len(labels.id2label) - len(categories)
            notes.append(covered(labels, reading.fill))
        reading.categories = categories
        kinds = ("boxes", "instances", "masks", "images") if outlined else ("boxes", "images")
        return Found(self.name, kinds, tree.root, ordered(splits), labels, notes, files[first])


@dataclass
class _Reading:
    """Reads the files of a set."""

    tree: Tree
    files: Mapping[str, str]
    masks: bool
    instances: bool = False
    fill: int = 0  # label of the pixels outside of all outlines
    shift: int = 0  # classes before those of the file
    categories: Mapping[int, str] | None = None

    def file(self, split: str) -> CocoSplit:
        """What the file of a split says."""
        images, file = ImagesOf(self.tree.root), self.files[split]
        locate = partial(images.locate, file, split)
        return read_coco(self.tree.root, split, self.tree.path(file), False, locate, self.masks, self.instances)

    def read(self, split: str) -> Content:
        """The images of a split with their objects, or their masks."""
        said = self.file(split)
        if said.categories != self.categories:
            odd = sorted({*said.categories.items()} ^ {*(self.categories or {}).items()})
            raise InputError(
                f"{self.files[split]}: expected the categories of the other splits, got others: {odd[:6]}"
            )
        counts = np.diff(said.annotations.ends)
        bare = [] if self.masks else np.flatnonzero(counts == 0).tolist()
        content = Content(said.rows, said.annotations, bare=bare, notes=said.warnings)
        if self.masks and said.outlines is not None:
            content.drawn = self._drawn(said, content.notes)
        return content

    def _drawn(self, said: CocoSplit, notes: list[str]) -> DrawnMasks:
        """The masks of a file. Raises InputError for unknown categories."""
        assert said.outlines is not None
        entries, owners = said.outlines
        wrong = [problem for _, note in said.annotations.odd_ones(range(len(said.rows))) for problem in note.wrong]
        if wrong:
            raise InputError(shortened(wrong))
        classes = {key: index + self.shift for index, key in enumerate(said.categories)}
        kinds = [entries.kind(place) for place in range(len(owners))]
        order = np.argsort(owners, kind="stable")
        ends = np.searchsorted(owners[order], np.arange(len(said.rows) + 1))
        outlines = entries.outlines
        assert outlines is not None
        without = [place for place in range(len(owners)) if owners[place] >= 0 and not outlines.has(place)]
        if without:
            first = said.rows.names[int(owners[without[0]])]
            notes.append(
                f"{len(without)} objects have no outline, first in {first}; their boxes are void in the masks"
            )
        boxes = np.asarray(entries.boxes).reshape(-1, 4)
        labels = np.array([classes.get(kind, VOID) for kind in kinds], np.int64)
        return DrawnMasks(outlines, order, ends, labels, self.fill, boxes, said.annotations.sizes)


def mask_labels(names: Sequence[str], void: bool = False) -> tuple[Labels, int]:
    """The classes of masks that are drawn from outlines of the classes `names`, and the label of what none covers: the
    class of the background, with one before the others if there is none; or void."""
    if void:
        return Labels(dict(enumerate(names))), VOID
    named = next((index for index, name in enumerate(names) if name.lower() == BACKGROUND), None)
    if named is not None:
        return Labels(dict(enumerate(names))), named
    return Labels(dict(enumerate([BACKGROUND, *names]))), 0


def covered(labels: Labels, fill: int) -> str:
    """A note on what no outline covers."""
    what = "void" if fill == VOID else f"the class {labels.id2label[fill]!r}"
    return f"masks are drawn from the outlines, the smaller object on top; pixels outside of all are {what}"
