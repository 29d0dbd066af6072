"""Which class of a teacher is which of a student, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cankd_hf.errors import InputError


def class_order(
    teacher: Mapping[int, str], student: Mapping[int, str], class_map: Mapping[str, str] | None, name: str
) -> list[int] | None:
    """For each class of the student that of the teacher; None where they are in one order.

    Names are compared without case, and with `_` and `-` as spaces. Models whose classes are called `LABEL_0`, or
    have no names, are taken to be in one order.

    Args:
        teacher: names of the teacher's classes.
        student: names of the student's classes.
        class_map: the student's name of classes that the teacher calls otherwise, `teacher.class_map` of a recipe.
        name: the teacher's, for messages.

    Raises:
        InputError: if the names are not the same, or `class_map` names classes that there are not.
    """
    given = dict(class_map or {})
    theirs, ours = (_names(names) for names in (teacher, student))
    if unknown := [key for key in given if _plain(key) not in map(_plain, theirs)]:
        raise InputError(
            [f"teacher.class_map: {name} has no class {key!r}; its classes are {_few(theirs)}" for key in unknown]
        )
    if not theirs or not ours or len(theirs) != len(ours):
        return None  # nothing to go by; other numbers of classes are refused elsewhere
    by_theirs = {_plain(key): value for key, value in given.items()}
    mapped = [_plain(by_theirs.get(_plain(one), one)) for one in theirs]
    wanted = [_plain(one) for one in ours]
    if mapped == wanted:
        return None
    if sorted(mapped) != sorted(wanted) or len(set(wanted)) < len(wanted):
        others = [one for one, plain in zip(theirs, mapped, strict=True) if plain not in wanted]
        missing = [one for one, plain in zip(ours, wanted, strict=True) if plain not in mapped]
        raise InputError(
            f"teacher: {name} has the classes {_few(others)} where the student has {_few(missing)}; write which is "
            "which in teacher.class_map: {teacher's name: student's name}"
        )
    return [mapped.index(one) for one in wanted]


def _names(names: Mapping[int, str]) -> list[str]:
    """The names in the order of their numbers; empty if they say nothing."""
    found = [str(names[key]) for key in sorted(names, key=int)]
    return [] if all(re.fullmatch(r"LABEL_\d+", one) for one in found) else found


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.strip().lower()))


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
