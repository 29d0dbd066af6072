"""Class names of sets with boxes: those of the data, and those of a labels file beside it."""

import json
from dataclasses import replace

import numpy as np

from cankd_hf.data.common.labels import Labels
from cankd_hf.data.detection.objects import Annotation
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.data.layouts.base import Found
from cankd_hf.errors import InputError


def box_labels(found: Found, known: Labels) -> tuple[Labels, list[str]]:
    """The classes of a set of boxes, and what to tell of them.

    A labels file gives the names of classes that the data number, and the order of those that the data name. It may
    have more classes than occur where they were counted.

    Args:
        found: the set.
        known: the classes of the labels file, or of `data.num_labels`; without names if there is neither.

    Raises:
        InputError: if a class of the data is missing there.
    """
    own = found.labels
    if own is None or not known.id2label:
        return own or known, _unnamed(found)
    names = dict(zip(known.own_ids, known.id2label.values(), strict=True))
    keys: list[int | str] = list(own.ids) if own.ids else list(own.id2label.values())
    given: list[int | str] = list(names) if own.ids else list(names.values())
    counted = not found.label_source
    if not counted and _is_number(known):
        if len(names) != len(keys):
            said = f"{len(keys)}, the classes of {found.label_source}, got {len(names)}; drop it"
            raise InputError(f"data.num_labels: expected {said}")
        return own, []
    if own.ids and not counted and {*names.values()} == {*own.id2label.values()}:  # numbered otherwise there
        return own, []
    lost = [key for key in keys if key not in given]
    extra = [key for key in given if key not in keys]
    if lost or (extra and own.ids and not counted):
        said = f"the classes {keys} of {found.label_source or 'the data'}"
        raise InputError(f"data.labels: expected {said}, got {given}; correct the labels, or drop them")
    if not own.ids:
        return known, []
    ids = [*own.ids, *(key for key in names if key not in own.ids)]
    return Labels({n: names[key] for n, key in enumerate(ids)}, palette=_colours(ids, known), ids=ids), []


def drawn_labels(found: Found, known: Labels) -> tuple[Labels, list[str]]:
    """The classes of masks that are drawn, under the names of a labels file if there is one, and what to tell of them.

    A labels file that has the names of the data is one for its boxes. Raises InputError for another number of names.
    """
    own = found.labels or Labels()
    if not known.id2label or {*known.id2label.values()} <= {*own.id2label.values()}:
        return replace(own, ignore_index=known.ignore_index), _unnamed(found)
    if known.id2label and len(known.id2label) != len(own.id2label):
        said = (
            f"the {len(own.id2label)} classes {list(own.id2label.values())} of masks drawn from {found.label_source}"
        )
        raise InputError(f"data.labels: expected {said}, got {len(known.id2label)}; correct the labels, or drop them")
    names = own.id2label if _is_number(known) else known.id2label
    return replace(own, id2label=names, palette=known.palette, ignore_index=known.ignore_index), []


def renumbered(table: AnnotationTable, found: Found, labels: Labels) -> AnnotationTable:
    """The same objects, their classes in the order of `labels` instead of that of the set."""
    own = found.labels or Labels()
    if own.ids or own.id2label == labels.id2label:
        return table
    place = {name: label for label, name in labels.id2label.items()}
    order = np.array([place[name] for name in own.id2label.values()], np.int64)

    def one(note: Annotation) -> Annotation:
        return replace(note, classes=order[note.classes])

    odd = {index: one(note) for index, note in table.odd.items()}
    return replace(table, classes=order[table.classes], odd=odd)


def _is_number(known: Labels) -> bool:
    """Whether the names are those that `data.num_labels` makes."""
    return all(name == f"class_{label}" for label, name in known.id2label.items())


def _unnamed(found: Found) -> list[str]:
    """A note on classes that nobody names."""
    if found.label_source or found.labels is None:
        return []
    names = found.labels.id2label
    content = json.dumps({"id2label": {str(label): name for label, name in names.items()}}, ensure_ascii=False)
    return [
        f"no class names in {found.root}: its {len(names)} classes are called {', '.join(names.values())}; to name "
        f"them, write this to {found.root / 'labels.json'}: {content}"
    ]


def _colours(ids: list[int], known: Labels) -> dict[int, tuple[int, int, int]]:
    """The colours of a labels file, by the classes of the set."""
    by_id = {own: known.palette[label] for label, own in enumerate(known.own_ids) if label in known.palette}
    return {label: by_id[own] for label, own in enumerate(ids) if own in by_id}
