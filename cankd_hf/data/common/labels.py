"""Class names, colours and the void label of a data set."""

import colorsys
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cankd_hf.config.data import DataConfig
from cankd_hf.errors import InputError


@dataclass
class Labels:
    """The meaning of a set's labels."""

    id2label: dict[int, str] = field(default_factory=dict)  # names of the classes 0..K-1; empty if unknown
    ignore_index: int = 255  # label left out of losses and scores
    reduce_labels: bool = False  # label 0 of the masks is void, the classes begin at 1
    # colours of the data set itself; empty if it has none
    palette: dict[int, tuple[int, int, int]] = field(default_factory=dict)

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


def read_labels(config: DataConfig, file: Path | None, class_names: list[str] | None = None) -> Labels:
    """Combine the labels file, else the names in the data set's features, with the recipe's settings, which win.
    Raises InputError if the file cannot be read, or names and ids do not match."""
    if file is not None:
        labels = _read_file(file, config.ignore_index)
        labels.reduce_labels = labels.reduce_labels or config.reduce_labels
    else:
        void = 255 if config.ignore_index is None else config.ignore_index
        labels = Labels(dict(enumerate(class_names or [])), void, config.reduce_labels)
    if config.num_labels is not None:
        if labels.id2label and len(labels.id2label) != config.num_labels:
            raise InputError(
                f"data.num_labels: expected {len(labels.id2label)} as named by {file or 'the data set'}, "
                f"got {config.num_labels}; drop data.num_labels"
            )
        labels.id2label = labels.id2label or {index: f"class_{index}" for index in range(config.num_labels)}
    return labels


def _read_file(file: Path, ignore_index: int | None) -> Labels:
    """Read a json file; `ignore_index`, if given, overrides the file's."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"data.labels: expected a json file, got {file}, which does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"data.labels: {file} is not valid json: {error}") from None
    if isinstance(content, list):
        content = {"id2label": dict(enumerate(content))}
    if not isinstance(content, dict):
        raise InputError(f"data.labels: {file}: expected an object with `id2label`, got {type(content).__name__}")
    if "id2label" not in content:
        content = {"id2label": content}
    try:
        names = {int(key): str(value) for key, value in content["id2label"].items()}
        palette = {int(key): _colour(value) for key, value in (content.get("palette") or {}).items()}
    except (ValueError, TypeError, AttributeError):
        raise InputError(
            f'data.labels: {file}: expected {{"id2label": {{"0": "sky", ...}}, "palette": {{"0": [9, 9, 9], ...}}}}, '
            "got keys that are no numbers or colours that are no triples"
        ) from None
    void = content.get("ignore_index") if ignore_index is None else ignore_index
    void = void if isinstance(void, int) else 255
    classes = sorted(set(names) - {void})
    if classes != list(range(len(classes))):
        raise InputError(
            f"data.labels: {file}: expected the ids 0..K-1 without a gap (and at most the ignore index "
            f"{void} beside them), got {sorted(names)}"
        )
    return Labels({key: names[key] for key in classes}, void, bool(content.get("reduce_labels", False)), palette)


def _colour(value: Any) -> tuple[int, int, int]:
    red, green, blue = (int(part) for part in value)
    return red, green, blue
