"""The one exception for bad input."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any


class Problem(str):
    """A message with its place: `path: message` as text.

    Args:
        path: dotted path or another name of the place; "" if the message contains it.
        message: what was expected, what was found, what to do.
    """

    path: str
    message: str

    def __new__(cls, path: str, message: str = "") -> Problem:  # unpickling gives the text alone, then the attributes
        made = super().__new__(cls, f"{path}: {message}" if path and message else path or message)
        made.path, made.message = path, message
        return made


def _one_line(problem: str) -> str:
    """The problem in one line: names of files and messages of libraries may hold line ends and terminal escapes."""
    if not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", problem):
        return problem
    parts = (problem.path, problem.message) if isinstance(problem, Problem) else ("", problem)
    path, message = (
        re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], " ".join(part.split())) for part in parts
    )
    return Problem(path, message)


def together(*checks: Callable[[], Any]) -> list[Any]:
    """Runs all checks, and returns their results.

    Raises:
        InputError: with the problems of all that failed, each once.
    """
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(dict.fromkeys(problems))
    return results


def _without_traceback(kind: type, text: str) -> list[str]:
    """The problems in a text; of an error in a loading process torch makes one of the traceback there."""
    if not re.match(r"Caught \w+ in (DataLoader worker process|pin memory thread)", text):
        return [text]
    return text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip().splitlines()


class InputError(ValueError):
    """Invalid input of the user: a recipe, a folder, an image, a checkpoint.

    Commands print it without a traceback and exit with code 2.

    Args:
        problems: one message or several, each with the place, what was expected, what was found and the fix;
            a `Problem` has its place as an attribute.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        said = _without_traceback(type(self), problems) if isinstance(problems, str) else problems
        self.problems = [_one_line(problem) for problem in said]
        super().__init__("\n".join(self.problems))
