"""What other libraries say while a command runs: only what its user can act on. Imports nothing heavy."""

import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Libraries whose warnings are about their own insides; ours are not among them, and errors are never hidden. The Hub's
# client is left alone: what it says of tokens and of downloads is for the user.
LIBRARIES = ("accelerate", "datasets", "matplotlib", "timm", "torch", "torchvision", "transformers")
# Read by these libraries when they are imported.
_LEVELS = {
    **{"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error"},
    **{"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_LOGS": "-all"},  # all of torch from errors on
}
OURS = "cankd_hf"
# What each process says of its own images; all else is the same in each.
_OF_EACH = ("cankd_hf.data.common.dataset", "cankd_hf.data.common.streams")
# What it says of a data set is told once, however often the command opens it: for teachers of other statistics, or for
# phases.
_ONCE = f"{OURS}.data"


@contextmanager
def quiet_libraries(shows_all: bool) -> Iterator[None]:
    """Inside, other libraries warn of nothing, this package's lines stay whole beside progress bars, and of several
    processes the first one speaks for all. What is said of a data set is told once. Afterwards all is as it was, but
    for what libraries read at their import.

    Args:
        shows_all: hide nothing.
    """
    handler = _BesideBars()
    own = logging.getLogger(OURS)
    levels: dict[logging.Logger, int] = {}
    set_here = {} if shows_all else {name: value for name, value in _LEVELS.items() if name not in os.environ}
    with warnings.catch_warnings():
        try:
            os.environ.update(set_here)
            own.addHandler(handler)
            if not shows_all:
                for name in LIBRARIES:
                    warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
                    _set(levels, name, logging.ERROR)
                if os.environ.get("RANK", "0") != "0":
                    _set(levels, OURS, logging.ERROR)
                    for name in _OF_EACH:
                        _set(levels, name, logging.WARNING)
            yield
        finally:
            own.removeHandler(handler)
            for name in set_here:
                os.environ.pop(name, None)
            for logger, level in levels.items():
                logger.setLevel(level)


def told_already(lines: Iterable[str]) -> None:
    """Lines about a data set that a command has told in its own form, and that are not to be told again."""
    for handler in logging.getLogger(OURS).handlers:
        if isinstance(handler, _BesideBars):
            handler.told.update(lines)


def _set(levels: dict[logging.Logger, int], name: str, level: int) -> None:
    """Sets the level of a logger, unless the user has set one."""
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET or name in sys.modules:
        levels[logger] = logger.level
        logger.setLevel(level)


class _BesideBars(logging.Handler):
    """Writes lines to stderr, above a progress bar if there is one; on a terminal they are broken between words."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()  # of data sets

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            return
        text = self.format(record)
        if record.name.startswith(_ONCE):
            text = text.removeprefix(f"{record.threadName}: ")  # of several students, which all have the same data
            if text in self.told:
                return
            self.told.add(text)
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns
            lines = (_folded(line, columns) for line in text.splitlines())
            text = "\n".join(lines)
        if "tqdm" not in sys.modules:
            sys.stderr.write(f"{text}\n")
            return
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


def _folded(line: str, columns: int) -> str:
    """A line in lines of a terminal's width, those after the first set in; long words, such as paths, stay whole."""
    return textwrap.fill(
        line, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
