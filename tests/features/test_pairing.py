"""Who learns from whom."""

from __future__ import annotations

import pytest

from cankd_hf.errors import InputError
from cankd_hf.features import Level, describe_levels, pair_levels


def levels(*strides: float) -> list[Level]:
    return [Level(f"t{i}", 8, stride, (round(448 / stride),) * 2) for i, stride in enumerate(strides)]


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((4, 8, 16, 32), (4, 8, 16, 32), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ((8, 16, 32), (4, 8, 16, 32), [(0, 1), (1, 2), (2, 3)]),
        ((4, 8, 16, 32), (8, 16, 32, 64), [(1, 0), (2, 1), (3, 2)]),
        ((3.96, 7.9, 15.6, 30.2), (4, 8, 16.1, 32), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ((4, 8, 16, 32), (14,), [(2, 0), (3, 0)]),
        ((8, 16, 32), (14,), [(1, 0), (2, 0)]),
        ((4, 8, 16, 32), (16,), [(2, 0), (3, 0)]),
        ((8, 16, 32, 64), (16,), [(1, 0), (2, 0)]),
        ((4, 8, 16, 32), (14, 14, 14, 14), [(2, 2), (3, 3)]),
        ((4, 8, 16, 32), (28,), [(3, 0)]),
        ((8,), (8,), [(0, 0)]),
        ((8,), (14,), [(0, 0)]),
        ((4, 8), (14,), [(1, 0)]),
        ((4, 8, 16, 32), (8, 16, 32, 32), [(1, 0), (2, 1), (3, 3)]),
        ((14, 14), (14, 14), [(1, 1)]),
        ((32,), (4, 8), [(0, 1)]),
    ],
)
def test_auto(student: tuple[float, ...], teacher: tuple[float, ...], pairs: list[tuple[int, int]]) -> None:
    assert pair_levels(levels(*student), levels(*teacher)) == pairs


def test_named() -> None:
    student, teacher = levels(4, 8, 16, 32), levels(14)
    assert pair_levels(student, teacher, [[0, 0], [-1, -1]]) == [(0, 0), (3, 0)]


@pytest.mark.parametrize(
    ("pairs", "messages"),
    [
        (
            [[0, 1], [4, 0]],
            ["pairs.0: expected a teacher level from 0 to 0, got 1", "pairs.1: expected a student lev"],
        ),
        ([[0]], ["pairs.0: expected two whole numbers"]),
        ([[0, 1.0]], ["pairs.0: expected two whole numbers"]),
        ([], ["at least one"]),
        ("all", ["expected 'auto' or a list"]),
    ],
)
def test_messages(pairs: object, messages: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        pair_levels(levels(4, 8, 16, 32), levels(14), pairs)  # type: ignore[arg-type]
    assert len(caught.value.problems) == len(messages)
    for problem, message in zip(caught.value.problems, messages, strict=True):
        assert message in problem


def test_no_levels_and_description() -> None:
    with pytest.raises(InputError, match=r"teacher\.taps: expected at least one level"):
        pair_levels(levels(4), [])
    assert describe_levels(levels(14)) == "0: t0 stride 14, 8 channels, 32x32"
