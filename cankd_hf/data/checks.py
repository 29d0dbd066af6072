"""A look at every image before training, so that nothing breaks hours into a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .config import DataConfig
from .dataset import Source


@dataclass
class Report:
    """What the look found.

    Attributes:
        usable: role -> indices of its source to use.
        skipped: file -> reason.
        warnings: what does not stop a run but should be known.
        checked: number of images looked at.
    """

    usable: dict[str, list[int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    checked: int = 0


def preflight(
    config: DataConfig, sources: dict[str, tuple[Source, Sequence[int]]], num_labels: int | None, ignore_index: int
) -> Report:
    """Not yet: takes everything as usable."""
    return Report(usable={role: list(indices) for role, (_, indices) in sources.items()})
