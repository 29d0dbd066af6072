"""The one exception for bad input."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave us is wrong: a recipe, a folder, an image, a checkpoint.

    Commands print it without a traceback and exit with code 2.

    Args:
        problems: one message or several, each naming the place, what was expected, what was got and the fix.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
