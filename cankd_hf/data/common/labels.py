"""Class names, colours and the void label of a data set."""

import colorsys
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.files import LABELS_LIMIT, printable, read_json, shortened, shown
from cankd_hf.errors import InputError

KEYS = ("id2label", "palette", "ignore_index", "reduce_labels", "num_labels", "label2id", "values", "by_colour")
LONGEST = 256  # characters of a name
VOID = 255  # the usual label of void
NO_CLASS = -1  # in `Labels.values` and `Labels.codes`: void
VOID_NAME = re.compile(r".*(void|ignore|unlabel|unknown|undefined|background|none|other|care).*", re.IGNORECASE)


@dataclass
class Labels:
    """The meaning of a set's labels."""

    id2label: dict[int, str] = field(default_factory=dict)  # names of the classes 0..K-1; empty if unknown
    ignore_index: int = 255  # label left out of losses and scores
    reduce_labels: bool = False  # label 0 of the masks is void, the classes begin at 1
    # colours of the data set itself; empty if it has none
    palette: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)  # the set's own id of each class; empty: 0..K-1 too
    # of masks: value of a pixel -> class, or `NO_CLASS`; empty: values are classes
    values: dict[int, int] = field(default_factory=dict)
    # of masks that are pictures, or have a palette: colour (red * 65536 + green * 256 + blue) -> class, or `NO_CLASS`;
    # empty: those of `palette` where a mask is an RGB picture, and the indices of a palette are classes
    codes: dict[int, int] = field(default_factory=dict)

    @property
    def own_ids(self) -> list[int]:
        """The set's own id of each class, in the order of the classes."""
        return self.ids or list(self.id2label)

    def check_names(self, config: DataConfig, example: str) -> None:
        """Raises InputError if no class has a name."""
        if not self.id2label:
            raise InputError(
                f"data.labels: expected the class names of {config.path}, found none; name a json file like "
                f'{{"id2label": {{"0": "{example}", ...}}}} under data.labels, or give data.num_labels'
            )

    def colours(self) -> dict[int, tuple[int, int, int]]:
        """A colour for each class: the set's own, else spread over the colour wheel."""
        result = {}
        for label in self.id2label:
            hue = (label * 0.618034) % 1  # golden ratio: neighbours in number are far apart in colour
            red, green, blue = colorsys.hsv_to_rgb(hue, 0.65, 0.95 - 0.25 * (label % 3) / 2)
            result[label] = self.palette.get(label, (round(255 * red), round(255 * green), round(255 * blue)))
        return result


def colour_code(colour: Sequence[int]) -> int:
    """A colour as one number."""
    return colour[0] * 65536 + colour[1] * 256 + colour[2]


def read_labels(
    config: DataConfig, file: Path | None, class_names: Sequence[str] | None = None, masks: bool = True
) -> Labels:
    """Combine the labels file, else the names in the data set's features, with the recipe's settings.

    With `masks`, labels are values of pixels: the ids are 0..K-1, beside which void has its own. Without, they are
    numbers of categories, which may have gaps.

    Raises:
        InputError: if the file cannot be read, or settings contradict each other; it names both places.
    """
    content: dict[str, Any] = {}
    place = "the data set"
    if file is not None:
        content, place = _content(file), str(file)
        names, palette = _names(content, place), _palette(content, place)
    else:
        names, palette = dict(enumerate(class_names or [])), {}
    problems = list(_contradictions(config, content, place, names, masks))
    if problems:
        raise InputError(shortened(problems))
    if config.num_labels is not None:
        names = names or {index: f"class_{index}" for index in range(config.num_labels)}
    if not masks:
        ids = sorted(names.keys() - {content.get("ignore_index")})
        known = {index: names[key] for index, key in enumerate(ids)}
        return Labels(known, palette={index: palette[key] for index, key in enumerate(ids) if key in palette}, ids=ids)
    void, source = _void(config, content, place)
    classes = sorted(names)
    said = f"{place if file or class_names else 'data.num_labels'} names the classes {_range(classes)}"
    if void in names and config.num_labels != len(names):  # named too, beside the classes
        classes.remove(void)
    if void in range(len(classes)) or (
        void in names and void == len(classes) and not VOID_NAME.fullmatch(names[void])
    ):
        raise InputError(
            f"data.ignore_index: expected a label of void outside the classes, as {said}, got {void} by {source}; "
            "change one of them"
        )
    if classes != list(range(len(classes))):
        raise InputError(
            f"data.labels: {file}: expected the ids 0..K-1 without a gap (and at most the ignore index "
            f"{void} beside them, by {source}), got {shown(sorted(names))}"
        )
    if strange := sorted(palette.keys() - {*classes, void}):
        raise InputError(f"data.labels: {place}: palette.{strange[0]}: expected colours of classes only, as {said}")
    reduced = bool(content.get("reduce_labels", False)) or config.reduce_labels
    values = _values(content, place, [*classes, void], void)
    if values and reduced:
        raise InputError(f"data.reduce_labels: expected false, as {place} gives `values` the classes, got true")
    codes = {colour_code(colour): NO_CLASS if key == void else key for key, colour in palette.items()}
    return Labels(
        {key: names[key] for key in classes},
        void,
        reduced,
        palette,
        values=values,
        codes=codes if content.get("by_colour") is True else {},
    )


def _content(file: Path) -> dict[str, Any]:
    """The content of a labels file, as an object with `id2label`."""
    content = read_json(file, "data.labels", LABELS_LIMIT, unique=True)
    if content in ([], {}):
        raise InputError(f"data.labels: {file}: expected the names of the classes, got none; write them, or remove it")
    if isinstance(content, list):
        content = {"id2label": {str(index): name for index, name in enumerate(content)}}
    if not isinstance(content, dict):
        raise InputError(f"data.labels: {file}: expected an object with `id2label`, got {type(content).__name__}")
    if "id2label" not in content:
        content = {"id2label": content}
    void = content.get("ignore_index")
    if void is not None and not _is_int(void, -(2**31), 2**31 - 1):
        raise InputError(f"data.labels: {file}: ignore_index: expected a whole number, got {shown(void)}")
    for key in content.keys() - set(KEYS):
        if near := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8):
            raise InputError(f"data.labels: {file}: {shown(key)}: unknown key; did you mean {near[0]!r}?")
    return content


def _names(content: Mapping[str, Any], place: str) -> dict[int, str]:
    """The classes of a labels file by their ids there."""
    given = content["id2label"]
    numbered = isinstance(given, dict) and all(re.fullmatch(r"-?[0-9]{1,9}", key) for key in given)
    if not numbered:
        raise InputError(
            f'data.labels: {place}: expected {{"id2label": {{"0": "sky", ...}}, "palette": {{"0": [9, 9, 9], ...}}}}, '
            f"got keys that are no numbers: {shown(given)}"
        )
    for key, value in given.items():
        if not isinstance(value, str) or not 0 < len(value.strip()) <= LONGEST or not printable(value):
            said = f"a name as text of 1 to {LONGEST} characters, got {shown(value)}"
            raise InputError(f"data.labels: {place}: id2label.{key}: expected {said}")
    names = {int(key): value for key, value in given.items()}
    if len(names) < len(given):
        raise InputError(f"data.labels: {place}: id2label: expected each id once, got {shown(list(given))}")
    return names


def _palette(content: Mapping[str, Any], place: str) -> dict[int, tuple[int, int, int]]:
    """The colours of a labels file by the ids there."""
    given = content.get("palette")
    if given is None:
        return {}
    if isinstance(given, list):
        given = {str(index): colour for index, colour in enumerate(given)}
    if not isinstance(given, dict) or not all(re.fullmatch(r"-?[0-9]{1,9}", key) for key in given):
        raise InputError(f'data.labels: {place}: palette: expected {{"0": [9, 9, 9], ...}}, got {shown(given)}')
    for key, value in given.items():
        if not (isinstance(value, list) and len(value) == 3 and all(_is_int(part, 0, 255) for part in value)):
            raise InputError(
                f"data.labels: {place}: palette.{key}: expected colours that are triples of 0..255, got {shown(value)}"
            )
    return {int(key): (value[0], value[1], value[2]) for key, value in given.items()}


def _values(content: Mapping[str, Any], place: str, known: Sequence[int], void: int) -> dict[int, int]:
    """The classes of the values in masks, where a labels file gives them."""
    given = content.get("values", {})
    said = f'data.labels: {place}: values: expected {{"0": 0, "128": 1, ...}}, value of a pixel -> class or {void}'
    if not isinstance(given, dict) or not all(re.fullmatch(r"[0-9]{1,9}", key) for key in given):
        raise InputError(f"{said}, got {shown(given)}")
    for key, value in given.items():
        if not _is_int(value, min(known), max(known)) or value not in known:
            raise InputError(f"{said}, got {shown(value)} for {key}")
    return {int(key): NO_CLASS if value == void else value for key, value in given.items()}


def _contradictions(
    config: DataConfig, content: Mapping[str, Any], place: str, names: Mapping[int, str], masks: bool
) -> Iterator[str]:
    """Settings of a labels file that contradict each other, or those of the recipe."""
    first: dict[str, int] = {}
    for key, name in names.items():
        if first.setdefault(name, key) != key:
            yield (
                f"data.labels: {place}: id2label.{first[name]} and id2label.{key} have the same name {shown(name)}; "
                "give each class its own"
            )
    void = content.get("ignore_index")
    if None not in (void, config.ignore_index) and void != config.ignore_index:
        yield (
            f"data.ignore_index: expected {void}, the ignore_index of {place}, got {config.ignore_index}; drop one of "
            "them"
        )
    reduced = content.get("reduce_labels", config.reduce_labels)
    if not isinstance(reduced, bool):
        yield f"data.labels: {place}: reduce_labels: expected true or false, got {shown(reduced)}"
    elif config.reduce_labels and not reduced:
        yield f"data.reduce_labels: expected false, the reduce_labels of {place}, got true; drop one of them"
    elif (
        masks
        and (reduced or config.reduce_labels)
        and re.fullmatch("void|background|unlabell?ed|ignored?|none", names.get(0, ""), re.I)
    ):
        where = f"reduce_labels in {place}" if "reduce_labels" in content else "data.reduce_labels"
        yield (
            f"data.labels: {place}: id2label.0: expected the first class, as {where} makes label 0 of the masks void "
            f"and label 1 class 0, got {names[0]!r}; leave it out and count from the class after it, or drop the shift"
        )
    for setting, value in (("reduce_labels", config.reduce_labels or None), ("ignore_index", config.ignore_index)):
        if not masks and value is not None:
            yield f"data.{setting}: expected none, as boxes have no label of void, got {value}; drop it"
    counted = len(names) - (_void(config, content, place)[0] in names)
    number = content.get("num_labels", counted)
    if not _is_int(number, 0, 10**9) or (number != counted and number != len(names)):
        yield f"data.labels: {place}: num_labels: expected {counted}, the number of its id2label, got {shown(number)}"
    if names and config.num_labels not in (None, counted, len(names)):
        yield (
            f"data.num_labels: expected {counted} as named by {place}, got {config.num_labels}; drop data.num_labels"
        )
    inverse = content.get("label2id", {})
    given = "label2id" in content
    odd = not isinstance(inverse, dict) or any(inverse.get(name) not in (key, str(key)) for key, name in names.items())
    if given and odd:
        yield f"data.labels: {place}: label2id: expected the opposite of its id2label, got {shown(inverse)}"


def _void(config: DataConfig, content: Mapping[str, Any], place: str) -> tuple[Any, str]:
    """The label of void, and the place that sets it."""
    if config.ignore_index is not None:
        return config.ignore_index, "data.ignore_index"
    if content.get("ignore_index") is not None:
        return content["ignore_index"], f"ignore_index in {place}"
    return VOID, "the default of data.ignore_index"


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _range(ids: Sequence[int]) -> str:
    """Ids in a few words."""
    return f"{ids[0]}..{ids[-1]}" if len(ids) > 2 and ids == [*range(ids[0], ids[-1] + 1)] else shown(list(ids))
