"""What the commands share: their parsers, exit codes, and a fast start."""

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
    """Keeps the garbage collector off: what imports create stays, and looking through it took a sixth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def exit_code(command: Callable[[], int], interrupted: str = "nothing was changed") -> int:
    """Runs a command and gives its exit code; what goes wrong is one line a problem on stderr, not a traceback.

    Args:
        command: gives the exit code where all goes well.
        interrupted: what to say of Ctrl-C.

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
        sys.stderr.write("\n")  # a progress bar may stand on this line
    sys.stderr.writelines(f"{line}\n" for line in lines)
