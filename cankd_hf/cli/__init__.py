"""Parsers, tables and the dry run of the commands."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Keeps the garbage collector off: what imports create stays, and looking through it took a sixth of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
