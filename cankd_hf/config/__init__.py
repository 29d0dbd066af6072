"""What a recipe says: each section as a dataclass, the reader and its advice. Imports no torch."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """The training arguments, where they were in cankd_hf 0.1."""
    if name in ("CanKDConfig", "stepped_schedule"):
        return getattr(import_module("cankd_hf.training.arguments"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
