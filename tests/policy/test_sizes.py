"""No file over 400 lines, no function over 60, no second copy of 15 lines, no print in the library."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from .sources import ROOT, all_files, package_files, parsed

MAX_FILE, MAX_FUNCTION, COPY = 400, 60, 15


def normalised(path: Path) -> list[tuple[int, str]]:
    """(line number, text without indentation) of the lines that are neither blank nor a comment."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    return [(number, text) for number, line in lines if (text := line.strip()) and not text.startswith("#")]


@pytest.mark.parametrize("path", all_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{lines} lines; split it at a seam a reader would choose"


def test_no_function_is_long() -> None:
    wrong = []
    for path in all_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_nothing_stands_twice() -> None:
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in all_files():
        lines = normalised(path)
        for start in range(len(lines) - COPY + 1):
            window = lines[start : start + COPY]
            places[tuple(text for _, text in window)].append(f"{path.relative_to(ROOT)}:{window[0][0]}")
    copies = [" = ".join(where) for where in places.values() if len(where) > 1]
    assert not copies, f"{COPY} equal lines stand in two places:\n" + "\n".join(copies[:20])


def test_every_public_thing_has_a_docstring() -> None:
    wrong = []
    for path in package_files():
        tree = parsed(path)
        if not ast.get_docstring(tree) and path.read_text(encoding="utf-8").strip():
            wrong.append(f"{path.relative_to(ROOT)}: module")
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert not wrong, "no docstring:\n" + "\n".join(wrong)


def test_no_swallowed_exceptions() -> None:
    wrong = []
    for path in package_files():
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ExceptHandler) or not all(isinstance(child, ast.Pass) for child in node.body):
                continue
            if not (isinstance(node.type, ast.Name) and node.type.id.startswith("_")):  # a signal of our own
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "except: pass hides an error:\n" + "\n".join(wrong)
