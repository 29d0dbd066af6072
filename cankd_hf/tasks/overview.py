"""What the labels of a data set are: counted by class, and drawn over their images."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cankd_hf.data.common.dataset import AnySource
from cankd_hf.data.common.decode import Sample
from cankd_hf.data.common.labels import Labels

TINY = 8  # pixels: boxes with a shorter side are below the finest cells of most detectors
MOST_DRAWN = 500  # boxes of a picture; more hide it, and take minutes
FEW_HOLD = 8  # images that most classes are in, where a class in one image is odd
FEW_NAMED = 12  # boxes of a picture whose names are written beside them


class Overview:
    """Counts samples of the splits of a set; of images without labels there is nothing to count.

    Args:
        labels: the classes of the set.

    Attributes:
        unit: what is counted of a class; "" for nothing.
        counts: split -> class -> how much of it there is.
        holding: split -> class -> images that hold it.
        whole: splits whose counts are of all their images, not of those that were read.
    """

    unit = ""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.counts: dict[str, Counter[int]] = {}
        self.holding: dict[str, Counter[int]] = {}
        self.whole: set[str] = set()
        self.notes: Counter[tuple[str, str]] = Counter()
        self.first: dict[tuple[str, str], str] = {}
        self.holders: dict[int, str] = {}

    def begin(self, split: str, source: AnySource) -> None:
        """Takes what a source knows without decoding images."""
        self.counts[split], self.holding[split] = Counter(), Counter()

    def add(self, split: str, sample: Sample) -> None:
        """Counts a sample."""

    def note(self, split: str, said: str, name: str) -> None:
        """Counts something that is odd about a sample, by its words."""
        self.notes[split, said] += 1
        self.first.setdefault((split, said), name)

    def hold(self, split: str, labels: Iterable[int], name: str) -> None:
        """Counts an image that holds these classes."""
        self.holding[split].update(labels)
        for label in labels:
            self.holders.setdefault(label, name)

    def name(self, label: int) -> str:
        """The name of a class."""
        return self.labels.id2label.get(label, f"class_{label}")

    @property
    def classes(self) -> list[int]:
        """All classes: those with a name, and those that were seen."""
        return sorted({*self.labels.id2label}.union(*self.counts.values()))

    def shares(self, split: str) -> dict[int, float]:
        """Class -> its share of what is counted in a split."""
        total = self.counts[split].total()
        return {label: self.counts[split][label] / total if total else 0.0 for label in self.classes}

    def problems(self, sampled: bool) -> list[str]:
        """What is odd, each with its number of images: notes of samples, and classes that a split lacks.

        Args:
            sampled: whether there are images that were not read.
        """
        said = [
            f"{split}: {count} image{'s' if count > 1 else ''} with {text}, first {self.first[split, text]}"
            for (split, text), count in self.notes.items()
        ]
        if not self.unit:
            return said
        said += self._single(sampled)
        if not self.classes:
            said.append(f"no classes: there are no {self.unit} to learn from")
        where = {
            label: [split for split in self.counts if self.counts[split][label] and self.counts[split].total()]
            for label in self.classes
        }
        counted = [split for split, counts in self.counts.items() if counts.total()]
        lacking: dict[str, list[str]] = {}
        for label, splits in where.items():
            if not splits:
                lacking.setdefault("in no split", []).append(self.name(label))
            elif splits == ["train"] and len(counted) > 1:
                lacking.setdefault("in train only: they have no score", []).append(self.name(label))
            elif "train" in counted and "train" not in splits:
                text = f"in {' and '.join(splits)} but not in train: nothing teaches them"
                lacking.setdefault(text, []).append(self.name(label))
        among = "in what was read, classes" if sampled and not self.whole >= {*counted} else "classes"
        return said + [f"{among} {text}: {', '.join(names)}" for text, names in lacking.items()]

    def _single(self, sampled: bool) -> list[str]:
        """Classes without names that one image holds: a slip of whoever drew it makes one."""
        held: Counter[int] = sum(self.holding.values(), Counter())
        if not held or statistics.median(held.values()) < FEW_HOLD:
            return []
        among = " of those read" if sampled else ""
        values = {label: value for value, label in self.labels.values.items()}
        return [
            f"class_{label}{f' (value {values[label]})' if label in values else ''} is in one image alone{among}, "
            f"{self.holders[label]}: a slip in its labels?"
            for label, count in held.items()
            if count == 1 and label in self.holders and self.name(label) == f"class_{label}"
        ]

    # Pictures

    @property
    def colours(self) -> dict[int, tuple[int, int, int]]:
        """A colour for each class: the set's own, or one that is far from its neighbours."""
        named = {label: self.name(label) for label in self.classes}
        return Labels(id2label=named, palette=self.labels.palette).colours()

    def draw(self, axis: Any, image: np.ndarray, sample: Sample) -> None:
        """Draws an image [h, w, 3], uint8, with the label of its sample, which may be larger."""
        axis.imshow(image, interpolation="bilinear")

    def say(self, axis: Any, text: str, left: float = 0.0, top: float = 0.0) -> None:
        """Writes on a picture, legible on any background."""
        from matplotlib.patheffects import withStroke

        said = axis.text(left + 2, top + 2, text[:24], fontsize=7, color="w", va="top")
        said.set_path_effects([withStroke(linewidth=1.8, foreground="k")])
        said.set_clip_on(True)

    def legend(self, samples: Sequence[Sample]) -> list[tuple[str, Any]]:
        """Names and colours, as matplotlib reads them, of the classes of these samples; the most frequent first."""
        return []

    def _legend(self, present: set[int], extra: Sequence[tuple[str, Any]] = ()) -> list[tuple[str, Any]]:
        total: Counter[int] = sum(self.counts.values(), Counter())
        order = sorted(present, key=lambda label: -total[label])
        shown = [(self.name(label), np.array(self.colours[label]) / 255) for label in order[:24]]
        return [*shown, *extra]


class MaskOverview(Overview):
    """Pixels of each class."""

    unit = "pixels"

    def add(self, split: str, sample: Sample) -> None:
        """Counts the pixels of a mask."""
        if sample.label is None:
            return
        labels, counts = torch.unique(sample.label, return_counts=True)
        found = dict(zip(labels.tolist(), counts.tolist(), strict=True))
        void = found.pop(self.labels.ignore_index, 0)
        self.counts[split].update(found)
        self.hold(split, found.keys(), sample.name)
        if not found:
            self.note(split, "a mask that is all void", sample.name)
        elif len(found) == 1 and len(self.labels.id2label) > 1:
            self.note(split, f"one class alone ({self.name(next(iter(found)))})", sample.name)
        elif void > 9 * sum(found.values()):
            self.note(split, "a mask that is void by more than 90%", sample.name)

    def draw(self, axis: Any, image: np.ndarray, sample: Sample) -> None:
        """The image, tinted by class; void is dark."""
        if sample.label is None:
            return super().draw(axis, image, sample)
        labels = resized(np.asarray(sample.label), image.shape[:2])
        table = self.colours
        tint = np.zeros(image.shape, np.float32)
        for label in np.unique(labels).tolist():
            tint[labels == label] = table.get(label, (0, 0, 0))
        mixed = 0.45 * image + 0.55 * tint
        mixed[labels == self.labels.ignore_index] = 0.25 * image[labels == self.labels.ignore_index]
        edges = np.zeros(labels.shape, bool)
        edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
        edges[1:] |= labels[1:] != labels[:-1]
        mixed[edges] = mixed[edges] * 0.55 + 255 * 0.45
        axis.imshow(mixed.clip(0, 255).astype(np.uint8), interpolation="bilinear")
        return None

    def legend(self, samples: Sequence[Sample]) -> list[tuple[str, Any]]:
        """The classes of the masks, and void where it is."""
        found = {int(label) for sample in samples if sample.label is not None for label in np.unique(sample.label)}
        extra = [("no label", "0.15")] if self.labels.ignore_index in found else []
        return self._legend(found - {self.labels.ignore_index}, extra)


class BoxOverview(Overview):
    """Boxes of each class."""

    unit = "boxes"

    def begin(self, split: str, source: AnySource) -> None:
        """Counts the boxes of all images, where their annotations are read already."""
        super().begin(split, source)
        table = getattr(source, "annotations", None)
        if table is None:
            return
        self.whole.add(split)
        owner = np.repeat(np.arange(len(table)), np.diff(table.ends))
        single = (table.iscrowd == 0) & ~np.isin(owner, list(table.odd))
        for label in np.unique(table.classes[single]).tolist():
            chosen = single & (table.classes == label)
            self.counts[split][label] = int(chosen.sum())
            self.holding[split][label] = len(np.unique(owner[chosen]))
        for note in table.odd.values():
            labels = note.classes[note.iscrowd == 0].tolist()
            self.counts[split].update(labels)
            self.holding[split].update({*labels})

    def add(self, split: str, sample: Sample) -> None:
        """Counts the boxes of an image."""
        found = sample.label
        if found is None:
            return
        for text in sample.dropped[:1]:
            self.note(split, "boxes that are left out", text)
        single = found.iscrowd == 0
        sides = (found.boxes[:, 2:] - found.boxes[:, :2]).amin(1) if len(found.boxes) else torch.zeros(0)
        for text in found.warnings[:1]:
            self.note(split, "boxes that look wrong", text)
        if not len(found.boxes):
            self.note(split, "no box", sample.name)
        if int(((sides < TINY) & single).sum()):
            self.note(split, f"a box of less than {TINY} pixels", sample.name)
        if split not in self.whole:
            labels = found.classes[single].tolist()
            self.counts[split].update(labels)
            self.hold(split, set(labels), sample.name)

    def draw(self, axis: Any, image: np.ndarray, sample: Sample) -> None:
        """The image with its boxes; of a few boxes the names too."""
        from matplotlib.patches import Rectangle

        super().draw(axis, image, sample)
        found = sample.label
        if found is None:
            return
        scale = image.shape[1] / sample.image.shape[-1]
        boxes, labels = found.boxes[:MOST_DRAWN] * scale, found.classes[:MOST_DRAWN]
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            left, top, right, bottom = box
            colour = np.array(self.colours[label]) / 255
            for edge, line in (("k", 2.6), (colour, 1.4)):  # the dark line is seen on any background
                axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec=edge, lw=line))
            if len(found.boxes) <= FEW_NAMED:
                self.say(axis, self.name(label), left, top)

    def legend(self, samples: Sequence[Sample]) -> list[tuple[str, Any]]:
        """The classes of the boxes."""
        return self._legend(
            {int(label) for sample in samples if sample.label is not None for label in sample.label.classes}
        )


class InstanceOverview(BoxOverview):
    """Masks of objects of each class."""

    unit = "masks"

    def draw(self, axis: Any, image: np.ndarray, sample: Sample) -> None:
        """The image with its masks tinted, and their boxes."""
        found = sample.label
        if found is not None and len(found.boxes):
            image = image.astype(np.float32)
            masks = found.masks()[:MOST_DRAWN].numpy()
            for mask, label in zip(masks, found.classes.tolist(), strict=False):
                inside = resized(mask, image.shape[:2]) > 0
                image[inside] = 0.5 * image[inside] + 0.5 * np.array(self.colours[label], np.float32)
            image = image.clip(0, 255).astype(np.uint8)
        super().draw(axis, image, sample)


class ClassOverview(Overview):
    """Images of each class."""

    unit = "images"

    def begin(self, split: str, source: AnySource) -> None:
        """Counts the classes of all images, where they are known already."""
        super().begin(split, source)
        known = getattr(source, "classes", None)
        if known is not None:
            self.whole.add(split)
            self.counts[split].update(int(label) for label in known if label >= 0)
            self.holding[split] = self.counts[split]

    def add(self, split: str, sample: Sample) -> None:
        """Counts the class of an image."""
        if sample.label is not None and split not in self.whole:
            self.counts[split][int(sample.label)] += 1
            self.holding[split][int(sample.label)] += 1

    def draw(self, axis: Any, image: np.ndarray, sample: Sample) -> None:
        """The image, with the name of its class."""
        super().draw(axis, image, sample)
        if sample.label is not None:
            self.say(axis, self.name(int(sample.label)))


def resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels [H, W] at another size, each the nearest one."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(size, labels.shape, strict=True))
    return labels[rows.astype(int)[:, None], columns.astype(int)[None]]


def class_table(overview: Overview, most: int = 40) -> list[tuple[str, dict[str, tuple[float, int]]]]:
    """(class, split -> share and images that hold it), the most frequent first; classes that are nowhere last."""
    total: Mapping[int, int] = sum(overview.counts.values(), Counter())
    order = sorted(overview.classes, key=lambda label: -total.get(label, 0))[:most]
    shares = {split: overview.shares(split) for split in overview.counts}
    return [
        (overview.name(label), {split: (shares[split][label], overview.holding[split][label]) for split in shares})
        for label in order
    ]
