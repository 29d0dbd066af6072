"""YAML as plain data, within limits, without code and without recursion: no text makes it hang, crash or swell.

The events of PyYAML's parser are read one by one. Tags, several documents and aliases that hold themselves are
refused; depth and number of values are limited, those of repeated aliases included.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from cankd_hf.config.advice import show
from cankd_hf.errors import InputError

MAX_CHARACTERS = 200_000
MAX_DEPTH = 24
MAX_VALUES = 20_000
MAX_TEXT = 10_000
# Line ends, terminal escapes, marks that turn the direction of text, halves of characters.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MAX_KEY = 200
_MAX_DIGITS = 18


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.1, but `5e-4` is a number, and dates and times of day are text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":float", ":int"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `parse_yaml`, or any other reader, takes for something else, such as "5e-4"."""


_NUMBERS = {
    "float": r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
    "int": r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|\d[\d_]*)",
}
for _kind, _pattern in _NUMBERS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$", re.ASCII), None)
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$", re.ASCII), "-+.0123456789"
    )


@dataclass
class _Open:
    """A mapping or list whose end was not read yet."""

    value: dict[Any, Any] | list[Any]
    path: str
    anchor: str | None
    key: Any = None
    has_key: bool = False
    merged: list[Any] = field(default_factory=list)  # values of `<<`


def parse_yaml(text: str, name: str, depth: int = 0) -> tuple[Any, dict[str, int], list[tuple[str, str]]]:
    """Reads one document.

    Args:
        text: the document.
        name: its name in messages.
        depth: the depth at which its value will be put.

    Returns:
        The value (None for an empty document), the line of each dotted path, and the problems of single values
        (dotted path and message).

    Raises:
        InputError: if the whole document cannot be used.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{name}: expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}; shorten it")
    builder = _Builder(depth)
    try:
        builder.read(text)
    except (yaml.YAMLError, _Refused) as error:
        raise InputError(f"{name}: not valid YAML: {_short(error)}") from None
    return builder.root, builder.lines, builder.wrong


def dump_yaml(content: Any) -> str:
    """YAML from which `parse_yaml` reads an equal value."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=119)


class _Refused(Exception):
    """A part that makes the whole document unusable."""

    def __init__(self, problem: str, mark: Any) -> None:
        self.problem, self.problem_mark = problem, mark
        super().__init__(problem)


class _Builder:
    """Builds plain data from parser events."""

    def __init__(self, depth: int) -> None:
        self.root: Any = None
        self.lines: dict[str, int] = {}
        self.wrong: list[tuple[str, str]] = []
        self._depth = depth
        self._open: list[_Open] = []
        self._anchors: dict[str, Any] = {}
        self._count = 0
        self._documents = 0

    def read(self, text: str) -> None:
        """Reads all events of a text."""
        loader: Any = _Loader(text)
        self._loader = loader
        while loader.check_event():
            event = loader.get_event()
            if isinstance(event, yaml.DocumentStartEvent):
                self._documents += 1
                if self._documents > 1:
                    raise _Refused("expected one document, got several", event.start_mark)
            elif isinstance(event, yaml.CollectionEndEvent):
                done = self._open.pop()
                for more in done.merged:
                    done.value.update({key: item for key, item in more.items() if key not in done.value})  # type: ignore
                self._put(done.value, event, done.anchor)
            elif isinstance(event, yaml.NodeEvent):
                self._node(event)

    def _node(self, event: Any) -> None:
        self._count += 1
        if self._count > MAX_VALUES:
            raise _Refused(f"expected at most {MAX_VALUES:,} values", event.start_mark)
        if getattr(event, "tag", None) is not None:
            problem = f"could not determine a constructor for the tag {quoted(event.tag)}; recipes take no tags"
            raise _Refused(problem, event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            if any(item.anchor == event.anchor for item in self._open):
                raise _Refused(f"the alias {quoted(str(event.anchor))} is inside of its own value", event.start_mark)
            if event.anchor not in self._anchors:
                raise _Refused(f"found undefined alias {quoted(str(event.anchor))}", event.start_mark)
            self._put(self._copied(self._anchors[event.anchor], len(self._open), event), event, None)
        elif isinstance(event, yaml.ScalarEvent):
            self._put(self._scalar(event), event, event.anchor)
        else:
            if self._depth + len(self._open) >= MAX_DEPTH:
                raise _Refused(f"expected at most {MAX_DEPTH} levels", event.start_mark)
            outer = self._open[-1] if self._open else None
            if outer is not None and isinstance(outer.value, dict) and not outer.has_key:
                raise _Refused("expected text as key, got a section or a list", event.start_mark)
            started: dict[Any, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
            self._open.append(_Open(started, self._path(), event.anchor))

    def _path(self) -> str:
        """Dotted path of the next value."""
        if not self._open:
            return ""
        outer = self._open[-1]
        key = outer.key if isinstance(outer.value, dict) else len(outer.value)
        return f"{outer.path}.{key}" if outer.path else str(key)

    def _put(self, value: Any, event: Any, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = value
        if not self._open:
            self.root = value
            return
        outer = self._open[-1]
        if isinstance(outer.value, list):
            self.lines.setdefault(self._path(), event.start_mark.line + 1)
            outer.value.append(value)
        elif not outer.has_key:
            outer.key, outer.has_key = self._key(value, outer, event), True
            self.lines.setdefault(self._path(), event.start_mark.line + 1)
        else:
            outer.has_key = False
            if outer.key == "<<":
                self._merge(value, outer, event)
            elif outer.key is not None:
                outer.value[outer.key] = value

    def _key(self, key: Any, outer: _Open, event: Any) -> Any:
        """A key; None if it cannot be one, which is told."""
        path = f"{outer.path}.{key}" if outer.path else str(key)
        if isinstance(key, bool) or not isinstance(key, str | int):
            self.wrong.append((path[:_MAX_KEY], f"expected text as key, got {show(key)}; write it in quotes"))
        elif not 0 < len(str(key)) <= _MAX_KEY or CONTROL.search(str(key)):
            path = f"{outer.path}.{quoted(str(key))}".lstrip(".")
            self.wrong.append((path, f"expected a short text as key, got {show(key)}; rename it"))
        elif key in outer.value:
            self.wrong.append((path, f"found duplicate key {key}; leave one of them"))
            return None
        else:
            return key
        return None

    def _merge(self, value: Any, outer: _Open, event: Any) -> None:
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) for item in found):
            raise _Refused("expected a section or a list of sections for merging", event.start_mark)
        outer.merged += found

    def _copied(self, value: Any, depth: int, event: Any) -> Any:
        """A copy of an alias's value, counted like the values themselves."""
        if not isinstance(value, dict | list):
            return value
        self._count += len(value)
        if self._count > MAX_VALUES:
            raise _Refused(f"expected at most {MAX_VALUES:,} values, aliases included", event.start_mark)
        if self._depth + depth >= MAX_DEPTH:
            raise _Refused(f"expected at most {MAX_DEPTH} levels, aliases included", event.start_mark)
        if isinstance(value, list):
            return [self._copied(item, depth + 1, event) for item in value]
        return {key: self._copied(item, depth + 1, event) for key, item in value.items()}

    def _scalar(self, event: Any) -> Any:
        tag = self._loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        is_key = bool(self._open) and isinstance(self._open[-1].value, dict) and not self._open[-1].has_key
        if tag == "tag:yaml.org,2002:merge":
            return "<<"
        if tag == "tag:yaml.org,2002:value":
            return event.value
        number = tag.endswith((":int", ":float"))
        if number and tag.endswith(":int") and len(event.value) > 80:
            value: Any = 10**_MAX_DIGITS
        else:
            try:
                value = self._loader.construct_object(yaml.ScalarNode(tag, event.value, event.start_mark))
            except (ValueError, OverflowError):  # 0x_
                value = event.value
        if number and not is_key and _too_large(value):
            wanted = "a finite number" if isinstance(value, float) else f"a number of at most {_MAX_DIGITS} digits"
            self.wrong.append((self._path(), f"expected {wanted}, got {event.value[:40]}; write a number"))
            return None
        if isinstance(value, str) and not is_key and (len(value) > MAX_TEXT or CONTROL.search(value)):
            wanted = f"expected one line of text, at most {MAX_TEXT:,} characters"
            self.wrong.append((self._path(), f"{wanted}, got {len(value):,}: {quoted(value)}; write it so"))
            return None
        return value


def quoted(text: str) -> str:
    """A text as shown in messages, shortened, with control characters escaped."""
    return show(text).removeprefix("the text ")


def _too_large(value: Any) -> bool:
    return (
        not math.isfinite(value)
        if isinstance(value, float)
        else isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS
    )


def _short(error: Any) -> str:
    """The problem of a YAML error in one line, with its position."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + " ".join(str(getattr(error, "problem", None) or str(error).partition("\n")[0]).split())
