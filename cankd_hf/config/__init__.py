"""Recipes: a dataclass for each section, the reader and its error messages. Does not import torch."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Imports of cankd_hf 0.1, where the training arguments were in this module."""
    if name in ("CanKDConfig", "stepped_schedule"):
        return getattr(import_module("cankd_hf.training.arguments"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
