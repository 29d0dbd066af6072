"""The one exception for bad input."""

from __future__ import annotations

from collections.abc import Iterable


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


class InputError(ValueError):
    """Invalid input of the user: a recipe, a folder, an image, a checkpoint.

    Commands print it without a traceback and exit with code 2.

    Args:
        problems: one message or several, each with the place, what was expected, what was found and the fix;
            a `Problem` has its place as an attribute.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
