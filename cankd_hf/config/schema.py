"""Plain YAML data -> typed dataclasses, strictly: every problem is found, with its place, and all are told at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cankd_hf.errors import InputError

MISSING = "???"  # OmegaConf's mark of a value the user has to give
_NOTHING = type(None)


def nearest(name: str, known: Iterable[str], say: str = "did you mean {!r}?") -> str:
    """A hint for a name that is unknown: the nearest known one, or all of them if none is near.

    Args:
        name: what was written.
        known: the names that exist.
        say: how to word the nearest name.
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return say.format(close[0])
    return f"known: {', '.join(known)}" if len(known) <= 30 else "see docs/recipes.md"


def show(value: Any) -> str:
    """A value as an error message names it: `the text '5e-4'`, `the list [1, 2]`, `null`."""
    if value is None:
        return "null"
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if isinstance(value, bool):
        return str(value).lower()
    for kind, name in ((str, "the text "), (list, "the list "), (dict, "the section ")):
        if isinstance(value, kind):
            return name + text
    return text


def describe(annotation: Any) -> str:
    """A type in words: `a whole number or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(member) for member in _ordered(arguments)))
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin in (list, tuple):
        inner = describe(arguments[0]).removeprefix("a ").removeprefix("an ") if arguments else ""
        if not arguments or arguments[0] is Any:
            return "a list"
        if inner.startswith("list"):
            return "a list of lists" + inner.removeprefix("list")
        return f"a list of {'sections' if inner.startswith('section') else inner + 's'}"
    if origin is dict or dataclasses.is_dataclass(annotation):
        return "a section of `key: value` lines"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(repr(member.value) for member in annotation)
    return str(annotation)


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "a section of `key: value` lines",
    Any: "anything",
    _NOTHING: "null",
}


def _ordered(members: Iterable[Any]) -> list[Any]:
    """Members of a union, null last; `str` beside an enum of the allowed strings is left out."""
    members = list(members)
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        members = [member for member in members if member is not str]
    return sorted(members, key=lambda member: member is _NOTHING)


def _advice(annotation: Any, value: Any) -> str:
    """What to write instead, for the mistakes people make."""
    members = _ordered(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    kinds = {get_origin(member) or member for member in members}
    if isinstance(value, str):
        if kinds & {int, float} and _number(value) is not None:
            return f"write it without quotes: {value.strip()}"
        if bool in kinds:
            return "write true or false, without quotes"
        if list in kinds:
            return f"write a list: [{value}]"
    if str in kinds and isinstance(value, bool | int | float):
        return f'write it in quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
    if int in kinds and isinstance(value, float):
        return f"write {int(value)}" if value == int(value) else "round it"
    if bool in kinds and isinstance(value, int):
        return "write true or false"
    if kinds & {list, tuple} and not isinstance(value, dict | _NOTHING):
        return f"write a list: [{value}]"
    if isinstance(value, list) and any(kind is dict or dataclasses.is_dataclass(kind) for kind in kinds):
        return "write `key: value` lines without the leading `- ` or the brackets"
    if isinstance(value, dict) and kinds & {list, tuple}:
        return "write a list: each item starts with `- `"
    return "see docs/recipes.md"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


class Reader:
    """Reads values against type annotations and collects what is wrong.

    Args:
        place: turns a dotted path into the words that name it for the user (path, file and line).
        elsewhere: for a key unknown where it stands, the dotted path where it belongs, or None.
        lenient: build a section from those of its values that are good, so that the rest of it can be checked too.
    """

    def __init__(
        self,
        place: Callable[[str], str] = str,
        elsewhere: Callable[[str], str | None] = lambda key: None,
        lenient: bool = False,
    ) -> None:
        self.place = place
        self.elsewhere = elsewhere
        self.lenient = lenient
        self.problems: list[str] = []
        self.said: set[str] = set()

    def say(self, path: str, message: str) -> None:
        """Adds a problem at a dotted path."""
        self.said.add(path)
        self.problems.append(f"{self.place(path)}: {message}")

    def wrong(self, path: str, annotation: Any, value: Any) -> None:
        """Adds 'expected ..., got ...; fix'."""
        self.say(path, f"expected {describe(annotation)}, got {show(value)}; {_advice(annotation, value)}")

    def unknown(self, path: str, key: str, known: Iterable[str]) -> None:
        """Adds 'unknown key', with the nearest name or the place where such a key belongs."""
        known = list(known)
        better = self.elsewhere(key)
        if better is not None and not difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            hint = f"did you mean {better!r}?"
        else:
            hint = nearest(key, known)
        self.say(_join(path, key), f"unknown key; {hint}")

    def raise_problems(self) -> None:
        """Raises `InputError` with everything found so far, if anything was."""
        if self.problems:
            raise InputError(dict.fromkeys(self.problems))

    def read(self, annotation: Any, value: Any, path: str) -> Any:
        """The value in the type that `annotation` asks for; None, with a problem noted, if it does not fit."""
        if isinstance(value, str) and value.strip() == MISSING:
            self.say(path, f"expected a value from you; give it on the command line: {path}=...")
            return None
        origin, arguments = get_origin(annotation), get_args(annotation)
        if annotation is Any:
            return value
        if origin in (Union, types.UnionType):
            return self._union(annotation, arguments, value, path)
        if origin is Literal:
            return self._choice(arguments, value, path)
        if isinstance(annotation, type) and issubclass(annotation, Enum):
            # YAML reads an unquoted `no` as false.
            choices = [member.value for member in annotation]
            return self._choice(choices, "no" if value is False and "no" in choices else value, path)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self.section(annotation, value, path)
        if (origin or annotation) in (list, tuple):
            return self._list(annotation, arguments, value, path)
        if (origin or annotation) is dict:
            return self._dict(annotation, arguments, value, path)
        return self._scalar(annotation, value, path)

    def section(self, cls: type, value: Any, path: str) -> Any:
        """An object of a dataclass from a mapping; every key is looked at before it is built."""
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        if not isinstance(value, dict):
            self.say(path, f"expected {describe(cls)}, got {show(value)}; {_as_section(value, path, list(fields))}")
            return None
        hints, good, before = get_type_hints(cls), {}, len(self.problems)
        for key, item in value.items():
            found = len(self.problems)
            if key not in fields:
                self.unknown(path, str(key), fields)
                continue
            result = self.read(hints[key], item, _join(path, key))
            if len(self.problems) == found:
                good[key] = result
        missing = False
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            missing |= required and name not in good
            if required and name not in value:
                self.say(_join(path, name), f"missing; expected {describe(hints[name])}")
        complete = len(self.problems) == before or (self.lenient and not missing)
        return cls(**good) if complete else None

    def keywords(self, hints: dict[str, Any], value: dict[str, Any], path: str) -> dict[str, Any]:
        """Checks a mapping against named types (a signature, say) and returns it with every value read."""
        result = {}
        for key, item in value.items():
            if key in hints:
                result[key] = self.read(hints[key], item, _join(path, key))
            else:
                self.unknown(path, str(key), hints)
        return result

    def _union(self, annotation: Any, members: Iterable[Any], value: Any, path: str) -> Any:
        members = _ordered(members)
        trials = []
        for member in members:
            trial = Reader(self.place, self.elsewhere, self.lenient)
            result = trial.read(member, value, path)
            if not trial.problems:
                return result
            trials.append((member, trial))
        # Of several forms, the one that looks like the value tells best what is wrong inside it.
        fitting = [trial for member, trial in trials if _looks_like(member, value)]
        real = [trial for member, trial in trials if member is not _NOTHING]
        if len(fitting) == 1:
            self._take(fitting[0])
        elif len(real) == 1 and (isinstance(value, list | dict) or dataclasses.is_dataclass(members[0])):
            self._take(real[0])
        else:
            self.wrong(path, annotation, value)
        return None

    def _take(self, trial: Reader) -> None:
        self.problems += trial.problems
        self.said |= trial.said

    def _choice(self, choices: Iterable[Any], value: Any, path: str) -> Any:
        choices = list(choices)
        for choice in choices:
            if value == choice and type(value) is type(choice):
                return value
        names = [str(choice) for choice in choices]
        hint = nearest(str(value), names)
        self.say(path, f"expected one of {', '.join(map(repr, choices))}, got {show(value)}; {hint}")
        return None

    def _list(self, annotation: Any, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, list | tuple):
            self.wrong(path, annotation, value)
            return None
        inner: list[Any] = [arguments[0] if arguments else Any] * len(value)
        if get_origin(annotation) is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                self.say(path, f"expected {len(arguments)} values, got {show(list(value))}")
                return None
            inner = list(arguments)
        items = [self.read(kind, item, f"{path}.{i}") for i, (kind, item) in enumerate(zip(inner, value, strict=True))]
        return tuple(items) if get_origin(annotation) is tuple else items

    def _dict(self, annotation: Any, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            self.wrong(path, annotation, value)
            return None
        kind = arguments[1] if arguments else Any
        return {key: self.read(kind, item, _join(path, str(key))) for key, item in value.items()}

    def _scalar(self, annotation: Any, value: Any, path: str) -> Any:
        if annotation is _NOTHING and value is None:
            return None
        if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
            self.say(path, f"expected a finite number, got {value}")
            return None
        if annotation in (bool, int, str) and type(value) is annotation:
            return value
        self.wrong(path, annotation, value)
        return None


def _as_section(value: Any, path: str, names: list[str]) -> str:
    """What to write where a section was expected; the text of a model or a folder has an obvious place."""
    if isinstance(value, list):
        return _advice(dict, value)
    for name in ("model", "path"):
        if isinstance(value, str) and name in names:
            return f"write it as {_join(path, name)}: {value}"
    return f"write a section with keys of these: {', '.join(names)}"


def _looks_like(annotation: Any, value: Any) -> bool:
    kind = get_origin(annotation) or annotation
    if isinstance(value, dict):
        return kind is dict or dataclasses.is_dataclass(kind)
    if isinstance(value, list):
        return kind in (list, tuple)
    return isinstance(value, str) and isinstance(kind, type) and issubclass(kind, Enum)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
