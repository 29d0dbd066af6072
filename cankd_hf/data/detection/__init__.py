"""Images with boxes: loading, transforms and collation."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Names that the module `cankd_hf.data.detection` had in cankd_hf 0.1."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cankd_hf.data.detection.load"), name)
