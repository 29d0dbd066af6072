"""The one exception for bad input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """Something the user gave us is wrong: a recipe, a folder, an image, a checkpoint.

    Commands print it without a traceback and exit with code 2.

    Args:
        problems: one message or several, each naming the place, what was expected, what was got and the fix.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command; bad input ends in one line a problem on stderr and the exit code 2, not in a traceback."""
    try:
        return command()
    except InputError as error:
        if sys.stderr.isatty():
            sys.stderr.write("\n")  # a progress bar may stand on this line
        for problem in error.problems:
            sys.stderr.write(f"error: {problem}\n")
        return 2
