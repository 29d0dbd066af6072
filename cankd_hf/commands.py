"""Shared code of the commands: parsers, exit codes, and faster imports."""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cankd_hf.errors import InputError


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of `python -m cankd_hf.NAME`, with examples below its help."""
    raw = argparse.RawDescriptionHelpFormatter
    prog = f"python -m cankd_hf.{name}"
    return argparse.ArgumentParser(prog=prog, description=description, epilog=examples, formatter_class=raw)


@contextmanager
def importing() -> Iterator[None]:
    """Disables the garbage collector during imports, which saves a sixth of the start-up time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def exit_code(command: Callable[[], int], interrupted: str = "nothing was changed") -> int:
    """Runs a command and returns its exit code; bad input is printed to stderr, a line per problem, without traceback.

    Args:
        command: returns the exit code.
        interrupted: end of the message after Ctrl-C.

    Returns:
        The command's own code; 2 after bad input; 130 after Ctrl-C.
    """
    try:
        return command()
    except InputError as error:
        _say(*(f"error: {problem}" for problem in error.problems))
        return 2
    except KeyboardInterrupt:
        _say(f"Interrupted; {interrupted}.")
        return 130


def _say(*lines: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\n")  # the line may contain a progress bar
    sys.stderr.writelines(f"{line}\n" for line in lines)
