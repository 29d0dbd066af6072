"""The classes of masks that nobody named: counted, and told with the line that names them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.labels import NO_CLASS, VOID, Labels, colour_code
from cankd_hf.data.layouts.base import Found
from cankd_hf.data.layouts.counting import Held, held_by
from cankd_hf.errors import InputError

CLASSES = 256  # more values than this are no classes
NEAR = 16  # how far a smoothed value is from black or white
CUT = {value: int(value > VOID // 2) for value in range(VOID + 1)}
FIX = "save masks as PNG without smoothing, with one value a class"


def classes_of(found: Found, config: DataConfig) -> tuple[Labels, list[str]]:
    """The classes in the masks of a set, and what to tell of them. Decodes all masks, the first time.

    Raises:
        InputError: for what cannot be told from the files: smoothed masks, instances, a single value.
    """
    held = _held(found, config)
    if held.photograph or not (held.values or held.colours):
        name = f"{held.photograph}, a photograph" if held.photograph else "none that decodes"
        raise InputError(
            f"data: expected masks with a value, or a colour, for each class in {found.root}, got {name}; {FIX}"
        )
    coloured = bool(held.pictures) or held.palettes_differ
    labels, said = _of_colours(held, found.root) if coloured else _of_values(held, found.root, config)
    count = len(labels.id2label)
    named = ", ".join(labels.id2label[label] for label in list(labels.id2label)[:12]) + (", ..." if count > 12 else "")
    paste = json.dumps(as_file(labels), ensure_ascii=False)
    return labels, [
        f"no class names in {found.root}: its {held.masks} masks hold {said}, used as {named}; to name them, write "
        f"this to {found.root / 'labels.json'}: {paste}"
    ]


def checked(found: Found, labels: Labels, config: DataConfig) -> tuple[Labels, list[str]]:
    """The same classes, which were named, with what some masks say of them: the values of masks that are 0 and 255.

    Raises:
        InputError: for masks of colours that nobody gave the classes.
    """
    if labels.values or labels.codes:
        return labels, []
    held = _held(found, config, some=32)
    if held.pictures and not labels.palette:
        colours = sorted(held.colours)[: len(labels.id2label)]
        palette = {str(at): [code >> 16, code >> 8 & 255, code & 255] for at, code in enumerate(colours)}
        raise InputError(
            f"data.labels: expected the colour of each class, as the masks of {found.root} are coloured, got names "
            f'alone; add "palette" to {found.root / "labels.json"}, with these colours in the order of the classes: '
            f"{json.dumps({'palette': palette})}"
        )
    if len(labels.id2label) != 2 or labels.reduce_labels or config.ignore_index is not None:
        return labels, []
    values = {0: 0, VOID: 1} if {*held.values} == {0, VOID} else CUT if _smoothed(held) else None
    if values is None:
        return labels, []
    said = "0 and 255" if len(values) == 2 else "smoothed black and white, cut at 128"
    return replace(labels, values=values), [
        f"the masks hold {said}, used as {labels.id2label[0]} and {labels.id2label[1]}"
    ]


def _smoothed(held: Held) -> bool:
    """Whether the masks are black and white but for smoothed edges, as of JPEG or after resizing."""
    near = [value for value in held.values if VOID - NEAR <= value < VOID]  # which no number of a class is
    extreme = sum(count for value, count in held.values.items() if value <= NEAR or VOID - NEAR <= value <= VOID)
    return len(held.values) > 32 and len(near) > NEAR / 4 and extreme > 0.9 * sum(held.values.values())


def as_file(labels: Labels) -> dict[str, object]:
    """The content of a labels file that says the same."""
    made: dict[str, object] = {"id2label": {str(key): name for key, name in labels.id2label.items()}}
    if labels.palette:
        made["palette"] = {str(key): list(colour) for key, colour in labels.palette.items()}
    if labels.ignore_index != VOID:
        made["ignore_index"] = labels.ignore_index
    if labels.reduce_labels:
        made["reduce_labels"] = True
    if labels.values and labels.values != CUT:  # which is found again
        made["values"] = {
            str(value): labels.ignore_index if label == NO_CLASS else label for value, label in labels.values.items()
        }
    if labels.codes:
        made["by_colour"] = True
    return made


def _held(found: Found, config: DataConfig, some: int | None = None) -> Held:
    """What the masks of all splits hold, or that of some spread over them."""
    names: list[str] = []
    for split in found.splits.values():
        masks = split.content.rows.masks
        names += [name for at in range(len(masks)) if (name := masks[at])] if masks is not None else []
    names = sorted({*names})
    return held_by(found.root, names if some is None else names[:: max(1, len(names) // some)], config.max_pixels)


def _of_colours(held: Held, root: Path) -> tuple[Labels, str]:
    """A class for each colour."""
    codes = sorted({*held.colours, *(value * 65793 for value in held.values if held.grey_pictures)})
    if len(codes) > CLASSES:
        raise InputError(f"data: expected a colour for each class in the masks of {root}, got {len(codes)}; {FIX}")
    colours = [(code >> 16, code >> 8 & 255, code & 255) for code in codes]
    labels = Labels(_numbered(len(codes)), palette=dict(enumerate(colours)))
    labels.codes = {colour_code(colour): label for label, colour in labels.palette.items()}
    listed = ", ".join(map(str, colours[:8])) + (", ..." if len(colours) > 8 else "")
    black = "; black is void if it is left out of both lists" if codes[0] == 0 else ""
    return labels, f"{len(codes)} colours ({listed}{black})"


def _of_values(held: Held, root: Path, config: DataConfig) -> tuple[Labels, str]:
    """A class for each value beside void."""
    void = VOID if config.ignore_index is None else config.ignore_index
    values = sorted(held.values)
    if _smoothed(held):
        return Labels({0: "background", 1: "foreground"}, values=CUT), "smoothed black and white, cut at 128"
    if len(values) > CLASSES:
        raise InputError(
            f"data: expected at most {CLASSES} values in the masks of {root}, got {len(values)}, up to {values[-1]}; "
            f"if they number objects, not classes, they are no semantic masks; {FIX}"
        )
    if values == [0, VOID] and config.ignore_index is None:
        return Labels({0: "background", 1: "foreground"}, values={0: 0, VOID: 1}), "0 and 255"
    classes = [value for value in values if value != void and not (value == 0 and config.reduce_labels)]
    said = ", ".join(map(str, classes[:12])) + (", ..." if len(classes) > 12 else "")
    listed = [*([said] if said else []), *([f"{void} (void)"] if void in values else [])]
    said = f"the values {' and '.join(listed)}"
    if len(classes) < 2:
        raise InputError(
            f"data: expected at least 2 classes in the masks of {root}, got {said}; name the classes of its masks in "
            f'{root / "labels.json"}: {{"id2label": {{"0": "...", "1": "..."}}}}'
        )
    labels = Labels(ignore_index=void, reduce_labels=config.reduce_labels)
    first = int(config.reduce_labels)
    if classes[0] == first and classes[-1] - first < 2 * len(classes) and not first <= void <= classes[-1]:
        count = classes[-1] - first + 1
        labels.id2label = {0: "background", 1: "foreground"} if classes == [0, 1] else _numbered(count)
        if missing := [f"class_{label}" for label in range(count) if label + first not in held.values]:
            said += f" (no pixel is {', '.join(missing[:8])})"
    else:
        if config.reduce_labels:
            raise InputError(f"data.reduce_labels: expected classes from 1 on without large gaps, got {said}")
        labels.id2label = _numbered(len(classes))
        labels.values = {value: label for label, value in enumerate(classes)} | {void: NO_CLASS}
    labels.palette = _palette(held.palette, labels, first)
    return labels, said


def _palette(palette: Mapping[int, int], labels: Labels, first: int) -> dict[int, tuple[int, int, int]]:
    """The colours of the masks' own palette, if it tells the classes apart."""
    of_class = labels.values or {label + first: label for label in labels.id2label}
    codes = {label: palette[value] for value, label in of_class.items() if value in palette and label != NO_CLASS}
    colours = {label: (code >> 16, code >> 8 & 255, code & 255) for label, code in codes.items()}
    grey = all(len({*colour}) == 1 for colour in colours.values())  # the numbers themselves, hardly to be told apart
    return {} if grey or len({*codes.values()}) < len(labels.id2label) else colours


def _numbered(count: int) -> dict[int, str]:
    return {label: f"class_{label}" for label in range(count)}
