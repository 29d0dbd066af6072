"""Which student level learns from which teacher level."""

from collections.abc import Sequence
from math import log2

from cankd_hf.errors import InputError
from cankd_hf.features.taps import Level

# Two strides are "the same" within half a factor of two: patch 14 against stride 16 (0.19), and the strides of odd
# image sizes, which rounding moves by a few percent.
_SAME = 0.5
# How far a one-stride teacher (a plain ViT) reaches towards coarser student levels: from stride 16 to a pyramid's 32.
_REACH = 1.5


def pair_levels(
    student: Sequence[Level], teacher: Sequence[Level], pairs: str | Sequence[Sequence[int]] = "auto"
) -> list[tuple[int, int]]:
    """Pairs student levels with teacher levels by the size of their cells in the student's image.

    The rules of "auto":

    1. Of several levels with one stride only the last (deepest) of each model counts.
    2. Teacher with several strides (a pyramid): each student level takes the nearest teacher level in log2 of the
       stride, if that is within half a factor of two; one teacher level serves one student level, the nearest.
    3. Teacher with one stride s (a plain ViT): the student levels from s / 1.4 to 2.8 s learn from it, which for patch
       14 and 16 are the strides 16 and 32 (the deep levels are those with evidence: RT-DETRv4, FD-CanKD). When the
       teacher has several levels of that one stride, its last goes to the coarsest of them, the one before to the next
       finer, and so on.
    4. If nothing lies within reach, the two nearest levels are paired.

    Args:
        student: levels of the student, fine to coarse.
        teacher: levels of the teacher, strides measured in the student's image.
        pairs: "auto", or a list of [student level, teacher level]; negative numbers count from the end.

    Returns:
        (student level, teacher level) indices, never empty, ordered by student level for "auto".

    Raises:
        InputError: if a listed pair does not exist, or a model has no level.
    """
    for name, levels in (("student", student), ("teacher", teacher)):
        if not levels:
            raise InputError(f"{name}.taps: expected at least one level, got none; fix: name a tap")
    if isinstance(pairs, str):
        if pairs != "auto":
            raise InputError(f"pairs: expected 'auto' or a list of [student level, teacher level], got {pairs!r}")
        return _auto(student, teacher)
    return _named(student, teacher, pairs)


def _auto(student: Sequence[Level], teacher: Sequence[Level]) -> list[tuple[int, int]]:
    ours, theirs = _last_per_stride(student), _last_per_stride(teacher)
    distance = {(s, t): abs(log2(student[s].stride / teacher[t].stride)) for s in ours for t in theirs}
    found: list[tuple[int, int]] = []
    if len(theirs) > 1:
        for s, t in sorted(distance, key=lambda pair: distance[pair]):
            free = all(s != pair[0] and t != pair[1] for pair in found)
            if free and distance[s, t] <= _SAME:
                found.append((s, t))
    else:
        stride = teacher[theirs[0]].stride
        deep = [s for s in ours if -_SAME <= log2(student[s].stride / stride) <= _REACH]
        last = len(teacher) - 1
        for steps, s in enumerate(reversed(deep)):
            found.append((s, max(last - steps, 0)))
    return sorted(found) or [min(distance, key=lambda pair: distance[pair])]


def _last_per_stride(levels: Sequence[Level]) -> list[int]:
    """Indices of the last level of each stride; equal means within a quarter of a factor of two."""
    kept: list[int] = []
    for index, level in enumerate(levels):
        same = [k for k in kept if abs(log2(levels[k].stride / level.stride)) < 0.25]
        kept = [k for k in kept if k not in same] + [index]
    return kept


def _named(
    student: Sequence[Level], teacher: Sequence[Level], pairs: Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    problems: list[str] = []
    found: list[tuple[int, int]] = []
    if not pairs:
        problems.append("pairs: expected at least one [student level, teacher level], got an empty list; fix: 'auto'")
    for number, pair in enumerate(pairs):
        whole = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not whole or not all(type(index) is int for index in pair):
            problems.append(f"pairs.{number}: expected two whole numbers [student level, teacher level], got {pair!r}")
            continue
        for name, index, levels in (("student", pair[0], student), ("teacher", pair[1], teacher)):
            if not -len(levels) <= index < len(levels):
                problems.append(
                    f"pairs.{number}: expected a {name} level from 0 to {len(levels) - 1}, got {index}; "
                    f"the {name}'s levels are {describe_levels(levels)}"
                )
        found.append((pair[0] % len(student), pair[1] % len(teacher)))
    if problems:
        raise InputError(problems)
    return found


def describe_levels(levels: Sequence[Level]) -> str:
    """Levels on one line: `0: neck:0 stride 4, 64 channels, 56x56; 1: ...`."""
    return "; ".join(
        f"{index}: {level.tap} stride {level.stride:g}, {level.channels} channels, {level.size[0]}x{level.size[1]}"
        for index, level in enumerate(levels)
    )
