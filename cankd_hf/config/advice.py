"""Describes types and values in error messages, and suggests what to write instead."""

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt

_LISTS = (list, tuple, Sequence)
_BOUNDS = {Ge: "of at least", Gt: "above", Le: "at most", Lt: "below"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_SECTION = "a section of `key: value` lines"
# Singular and plural.
_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    dict: (_SECTION, "sections"),
    Any: ("anything", "values"),
    type(None): ("null", "null"),
}


@dataclass(frozen=True)
class Say:
    """Metadata of a type in `Annotated`: its name in messages and docs, and the fix for an invalid value."""

    words: str = ""
    fix: str = ""


BEGINNING = 4  # letters of a name by which a longer one may be meant


def members(annotation: Any) -> list[Any]:
    """The types of a union, without null and without types that YAML cannot express (classes and functions)."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    hidden = (type(None), Callable)
    return [kind for kind in get_args(annotation) if kind not in hidden and get_origin(kind) is not Callable]


def bare(annotation: Any) -> Any:
    """The type without its bounds and without null; a union of several other types is kept."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif len(found := members(annotation)) == 1 and found[0] is not annotation:
            annotation = found[0]
        else:
            return annotation


def kind_of(annotation: Any) -> Any:
    """The class behind a type: `list` for `list[int] | None`."""
    annotation = bare(annotation)
    origin = get_origin(annotation) or annotation
    return list if origin in _LISTS else origin


def marks(annotation: Any) -> list[Any]:
    """What `Annotated` says beside a type."""
    found = [kind for kind in members(annotation) if get_origin(kind) is Annotated]
    return list(get_args(found[0])[1:]) if len(found) == 1 else []


def words(annotation: Any) -> str:
    """The description of a type given by `Say`, if any."""
    return next((mark.words for mark in marks(annotation) if isinstance(mark, Say)), "")


def nearest(name: str, known: Iterable[str], none_near: str | None = None) -> str:
    """A hint for an unknown name: the nearest known one; else `none_near`, or all known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = close or [one for one in known if len(name) >= BEGINNING and one.startswith(name)]
    if len(close) == 1:
        return f"did you mean {close[0]!r}?"
    return none_near or (f"known: {', '.join(known)}" if len(known) <= 30 else "see docs/recipes.md")


def not_one_of(name: str | None, known: Iterable[str]) -> str:
    """The message for a name that is none of the known ones."""
    known = list(known)
    return f"expected one of {', '.join(known)}, got {name!r}; {nearest(str(name), known, 'choose one of them')}"


def show(value: Any) -> str:
    """A value as shown in error messages: `the text '5e-4'`, `the list [1, 2]`, `null`."""
    if value is None:
        return "null"
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    if isinstance(value, bool):
        return str(value).lower()
    for kind, name in ((str, "the text "), (list, "the list "), (dict, "the section ")):
        if isinstance(value, kind):
            return name + text
    return text


def describe(annotation: Any, several: bool = False, bounds: bool = True) -> str:
    """A type in words, with its range (`bounds`): `a whole number of at least 1 or null`; several: `whole numbers`."""
    if get_origin(annotation) is Annotated:
        kind, *beside = get_args(annotation)
        if words(annotation):
            return words(annotation)
        limits = {type(mark): dataclasses.astuple(mark)[0] for mark in beside if type(mark) in _BOUNDS and bounds}
        if limits.keys() == {Ge, Le}:
            return f"{describe(kind, several)} from {limits[Ge]} to {limits[Le]}"
        found = " and ".join(f"{_BOUNDS[limit]} {number}" for limit, number in limits.items())
        return f"{describe(kind, several, bounds)} {found}".strip()
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = members(annotation) + ([type(None)] if type(None) in get_args(annotation) else [])
        return " or ".join(dict.fromkeys(describe(kind, several, bounds) for kind in kinds))
    if names := choices(annotation):
        return ("one of " if len(names) > 1 else "") + ", ".join(
            name if isinstance(name, str) else show(name) for name in names
        )
    kind = dict if dataclasses.is_dataclass(annotation) else kind_of(annotation)
    if kind is list:
        inner = (get_args(annotation) or (Any,))[0]
        of = "" if inner is Any else f" of {describe(inner, several=True, bounds=bounds)}"
        return ("lists" if several else "a list") + of
    return _WORDS[kind][several] if kind in _WORDS else str(annotation)


def choices(annotation: Any) -> list[Any]:
    """The values of a `Literal`; empty for other types."""
    kind = bare(annotation)
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def advice(annotation: Any, value: Any) -> str:
    """What to write instead, for common mistakes."""
    kinds = {kind_of(kind) for kind in members(annotation)}
    names = [str(name) for kind in members(annotation) for name in choices(kind)]
    fixes = [mark.fix for mark in marks(annotation) if isinstance(mark, Say) and mark.fix]
    if isinstance(value, str):
        if kinds & {int, float} and _NUMBER.fullmatch(value.strip()):
            return f"write it without quotes: {value.strip()}"
        if bool in kinds:
            return "write true or false, without quotes"
        if names:
            return nearest(value, names, "choose one of them")
    if str in kinds and isinstance(value, bool | int | float):
        return f'write it in quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
    if int in kinds and isinstance(value, float):
        return f"write {int(value)}" if value.is_integer() else "round it"
    if bool in kinds and isinstance(value, int):
        return "write true or false"
    if list in kinds and not isinstance(value, list | dict | None):
        if fixes:
            return fixes[0]
        length = next((mark.min_length for mark in marks(annotation) if isinstance(mark, Len)), 1)
        return f"write a list: [{', '.join([str(value)] * length)}]"
    if isinstance(value, list) and any(kind is dict or dataclasses.is_dataclass(kind) for kind in kinds):
        return "write `key: value` lines without the leading `- ` or the brackets"
    if isinstance(value, dict) and list in kinds:
        return "write a list: each item starts with `- `"
    return fixes[0] if fixes else "choose one of them" if names else "see docs/recipes.md"
