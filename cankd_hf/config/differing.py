"""What of a recipe differs from its defaults: the part of it that a new setting does not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from cankd_hf.config.advice import bare, members
from cankd_hf.config.recipe import Recipe, flat
from cankd_hf.config.schema import plain


def differing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults of today, and those that no section has (any more).

    Two recipes have equal ones just if they are the same run, whether a default is written or left out, and whether
    one of them was saved before a setting existed. A default that changes what runs do is thus a change of code. Of a
    section that is there and has defaults alone an empty mapping is left.

    Args:
        settings: value by dotted path, as `settings_that_count` gives them; saved ones of an earlier version too.
    """
    return _section(Recipe, dict(settings), "")


def _section(kind: Any, settings: dict[str, Any], path: str) -> dict[str, Any]:
    hints = _hints(kind)
    left, found = dict(settings), dict[str, Any]()
    for one in dataclasses.fields(kind):
        place = f"{path}.{one.name}" if path else one.name
        own = _below(settings, place)
        left = {key: value for key, value in left.items() if key not in own}
        if own and not _is_default(kind, one.name, own, place):
            found |= _value(hints[one.name], own, place) or {place: {}}
    return found | left


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _value(hint: Any, own: dict[str, Any], place: str) -> dict[str, Any]:
    if set(own) == {place}:
        return own  # nothing within it
    heads = dict.fromkeys(key.removeprefix(f"{place}.").split(".")[0] for key in own)
    counted = all(head.isdigit() for head in heads)
    for kind in map(bare, members(bare(hint))):
        if dataclasses.is_dataclass(kind) and not counted:
            return _section(kind, own, place)
        inner = [bare(part) for part in get_args(kind) if dataclasses.is_dataclass(bare(part))]
        if inner and get_origin(kind) is (list if counted else dict):
            places = [f"{place}.{head}" for head in heads]
            parts = [_section(inner[0], _below(own, spot), spot) or {spot: {}} for spot in places]
            return {key: value for part in parts for key, value in part.items()}
    return own


def _below(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key == place or key.startswith(f"{place}.")}


def _is_default(kind: Any, name: str, own: Mapping[str, Any], place: str) -> bool:
    return {key.removeprefix(place): value for key, value in own.items()} == _default(kind, name)


@cache
def _default(kind: Any, name: str) -> dict[str, Any] | None:
    """The default of a field as settings below its place; None where it is required."""
    one = next(one for one in dataclasses.fields(kind) if one.name == name)
    if one.default is MISSING and one.default_factory is MISSING:
        return None
    default = one.default if one.default_factory is MISSING else one.default_factory()
    return {key.removeprefix("-"): value for key, value in flat(plain(default), "-").items()}
