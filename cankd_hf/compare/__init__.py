"""The referee: comparisons of arms of one recipe, paired by seed, at equal steps and at equal cost."""

from cankd_hf.compare.command import main, parser

__all__ = ["main", "parser"]
