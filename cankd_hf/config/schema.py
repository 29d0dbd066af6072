"""Converts plain YAML data to typed dataclasses, strictly: pydantic checks, and its errors become our messages."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any, ClassVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cankd_hf.config.advice import advice, bare, choices, describe, kind_of, members, nearest, show, words
from cankd_hf.errors import InputError, Problem

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
# Error types of pydantic for a value of the wrong kind; messages then leave out the range.
_KINDS = ("bool_type", "float_type", "int_from_float", "int_type", "list_type", "string_type")


class Section:
    """Base class of the sections of a recipe: how they are read, and rules that involve several fields.

    Attributes:
        place: dotted path of the section in a recipe.
        one_of: fields of which exactly one must be set.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    place: ClassVar[str] = ""
    one_of: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Converts inner sections that are given in Python as a mapping, as in a recipe. One that cannot be converted
        stays as it is for `raise_problems`, which tells all that is wrong with it."""
        given = [name for name in _fields(type(self)) if isinstance(getattr(self, name), dict)]
        for name in given:
            hint = _fields(type(self))[name]
            if any(dataclasses.is_dataclass(kind) for kind in members(bare(hint))):
                with suppress(ValidationError):
                    setattr(self, name, _adapter(hint).validate_python(getattr(self, name)))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        schema = handler(source)
        # The values stay strict; the section itself is read from a mapping, which strict dataclasses refuse.
        handler.resolve_ref_schema(schema)["strict"] = False
        return schema

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges: key and message of each."""
        yield from ()

    def accepted(self) -> dict[str, dict[str, Any]]:
        """Names and types of the keys that a field of free-form settings accepts, by field."""
        return {}

    def raise_problems(self, path: str = "") -> None:
        """Runs the checks of a recipe on an object made in Python; messages call it `path`, or its `place`."""
        problems = Problems()
        problems.check(problems.read(type(self), self, path or self.place), path or self.place)
        problems.raise_all()


class Problems:
    """Collects all problems of a recipe, to report them together.

    Args:
        place: converts a dotted path to its form in messages (path, file and line).
        elsewhere: returns the dotted path where a misplaced key belongs, or None.
    """

    def __init__(
        self, place: Callable[[str], str] = str, elsewhere: Callable[[str], str | None] = lambda key: None
    ) -> None:
        self.place = place
        self.elsewhere = elsewhere
        self.found: list[tuple[str, str]] = []
        self._unread: set[str] = set()

    def say(self, path: str, message: str, unread: bool = False) -> None:
        """Adds a problem at a dotted path; `unread`: the value cannot be used, so that no further check reports it."""
        if self.usable(path):
            self.found.append((path, message))
        if unread and path:
            self._unread.add(path)

    def usable(self, *paths: str) -> bool:
        """Whether these values could be read."""
        return not any(path == bad or path.startswith(f"{bad}.") for path in paths for bad in self._unread)

    def raise_all(self) -> None:
        """Raises `InputError` with all problems found so far, if any."""
        if self.found:
            found = dict.fromkeys(self.found)
            raise InputError([Problem(self.place(path) if path else "", message) for path, message in found])

    def take(self, error: InputError, path: str) -> None:
        """Adds the problems of an error raised by another check; those without a place get `path`."""
        for problem in error.problems:
            if isinstance(problem, Problem):
                self.say(problem.path, problem.message)
            else:
                self.say(path, problem)

    def read(self, annotation: Any, value: Any, path: str) -> Any:
        """Converts a value to a type, leaving out its invalid parts; all problems are added."""
        value = plain(value)
        for attempt in range(4):  # removing a value can make a required one missing, which the next attempt fills in
            try:
                return _adapter(annotation).validate_python(value)
            except ValidationError as error:
                spots = [_Spot(annotation, value, item["loc"], item["type"]) for item in error.errors()]
            for spot in spots if attempt == 0 else ():
                self._tell(spot, path)
            for spot in spots:
                spot.mend()
        return None

    def keywords(self, hints: dict[str, Any], value: dict[str, Any], path: str) -> dict[str, Any]:
        """Checks a mapping against names and types, such as those of a signature, and returns the converted values."""
        for key in [key for key in value if key not in hints]:
            self.unknown(path, str(key), hints)
        return {key: self.read(hints[key], item, _join(path, key)) for key, item in value.items() if key in hints}

    def check(self, value: Any, path: str) -> None:
        """Adds the problems found by the rules of a section, and of those nested in it or in a container."""
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self.check(item, _join(path, key))
        if not isinstance(value, Section):
            return
        names = value.one_of
        given = " and ".join(name for name in names if getattr(value, name) is not None)
        if names and given not in names and self.usable(*(_join(path, name) for name in names)):
            expected = f"exactly one of {', '.join(names[:-1])} and {names[-1]}"
            self.say(path, f"expected {expected}, got {given or 'none'}; keep one, and write null for the others")
        for key, message in value.problems():
            self.say(_join(path, key), message)
        for key, hints in value.accepted().items():
            self.keywords(hints, getattr(value, key), _join(path, key))
        for key in _fields(type(value)):
            self.check(getattr(value, key), _join(path, key))

    def unknown(self, path: str, key: str, known: Iterable[str]) -> None:
        """Adds 'unknown key', with a similar name or the place where the key belongs."""
        known = list(known)
        better = self.elsewhere(key)
        if better is not None and not difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            hint = f"did you mean {better!r}?"
        else:
            hint = nearest(key, known)
        self.say(_join(path, key), f"unknown key; {hint}")

    def wrong(self, path: str, annotation: Any, value: Any, bounds: bool = True) -> None:
        """Adds 'expected ..., got ...; fix'; without `bounds`, the expected range is left out."""
        got = repr(value) if isinstance(value, str) and choices(annotation) else show(value)
        expected, fix = describe(annotation, bounds=bounds), advice(annotation, value)
        if isinstance(value, float) and not math.isfinite(value):
            expected, fix = "a finite number", "write a number"
        self.say(path, f"expected {expected}, got {got}; {fix}", unread=True)

    def _tell(self, spot: _Spot, path: str) -> None:
        where = _join(path, *spot.keys)
        if spot.error in ("unexpected_keyword_argument", "invalid_key"):
            self.unknown(_join(path, *spot.keys[:-1]), str(spot.keys[-1]), _fields(spot.parent))
        elif spot.error == "missing":
            self.say(where, f"missing; expected {describe(spot.annotation)}", unread=True)
        elif spot.of_key and spot.keys:
            self.say(where, f"expected text as key, got {show(spot.keys[-1])}; write it in quotes", unread=True)
        elif len(members(bare(spot.annotation))) > 1:
            # Of the types in a union, report the errors of the one that resembles the value.
            fitting = [kind for kind in members(bare(spot.annotation)) if _looks_like(kind, spot.value)]
            if len(fitting) == 1:
                self.read(fitting[0], spot.value, where)
                self._unread.add(where)
            else:
                self.wrong(where, spot.annotation, spot.value, bounds=False)
        elif dataclasses.is_dataclass(kind := bare(spot.annotation)):
            fix = _as_section(spot.value, where, list(_fields(kind)))
            self.say(where, f"expected {describe(kind)}, got {show(spot.value)}; {fix}", unread=True)
        else:
            self.wrong(where, spot.annotation, spot.value, bounds=spot.error not in _KINDS)


class _Spot:
    """Location of a pydantic error in types and data, followed up to the first union.

    (Beyond it, pydantic's location contains names of the union's members, which are not keys of the data.)
    """

    def __init__(self, annotation: Any, value: Any, location: tuple[int | str, ...], error: str) -> None:
        self.error = error
        self.of_key = location[-1:] == ("[key]",)
        self.annotation, self.value, self.parent = annotation, value, None
        self.keys: list[int | str] = []
        self._steps: list[tuple[Any, int | str, Any]] = []
        for key in location[: len(location) - self.of_key]:
            outer, kind = bare(self.annotation), kind_of(self.annotation)
            if words(self.annotation):
                break  # `[height, width]` is reported as a whole
            if dataclasses.is_dataclass(kind):
                inner = _fields(outer).get(str(key), Any)
            elif kind in (list, dict):
                inner = (get_args(outer) or (Any,))[-1]
            else:
                break
            self._steps.append((self.value, key, inner))
            self.keys.append(key)
            known = isinstance(self.value, list) or key in self.value
            self.annotation, self.value, self.parent = inner, self.value[key] if known else None, outer

    def mend(self) -> None:
        """Removes the value from the data, or replaces it with an empty one, so that the rest can be read."""
        for container, key, inner in reversed(self._steps):
            if dataclasses.is_dataclass(bare(inner)):
                container[key] = {}
            elif self.error == "missing":
                container[key] = ""
            elif isinstance(container, dict):
                container.pop(key, None)
            else:
                continue
            return


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=None if dataclasses.is_dataclass(annotation) else _STRICT)


def _fields(cls: Any) -> dict[str, Any]:
    """Name and type of every field of a dataclass."""
    return _hints(cls)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def plain(value: Any) -> Any:
    """Copies Python objects to plain data as in YAML: sections become mappings, tuples become lists."""
    if isinstance(value, Section):
        return {name: plain(getattr(value, name)) for name in _fields(type(value))}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _as_section(value: Any, path: str, names: list[str]) -> str:
    """The fix for a value in the place of a section; text is suggested as its `model` or `path`."""
    if isinstance(value, list):
        return advice(dict, value)
    if isinstance(value, str) and value.lower() in ("none", "no", "nothing", "-"):
        return "write null to go without"
    for name in ("model", "path"):
        if isinstance(value, str) and name in names:
            return f"write it as {_join(path, name)}: {value}"
    return f"write a section with keys of these: {', '.join(names)}"


def _looks_like(annotation: Any, value: Any) -> bool:
    kind = kind_of(annotation)
    if isinstance(value, dict):
        return kind is dict or dataclasses.is_dataclass(kind)
    if isinstance(value, list):
        return kind is list
    return kind in (int, float) and type(value) in (int, float)


def _join(*keys: int | str) -> str:
    return ".".join(str(key) for key in keys if key != "")
