"""Feature maps out of any model: taps, grids, pairs, connectors, similarity."""

from __future__ import annotations

from .connectors import Connector
from .grids import resize_map, to_maps, tokens_to_map
from .pairing import describe_levels, pair_levels
from .similarity import channel_correlation, linear_cka
from .taps import Level, Taps

__all__ = [
    "Connector",
    "Level",
    "Taps",
    "channel_correlation",
    "describe_levels",
    "linear_cka",
    "pair_levels",
    "resize_map",
    "to_maps",
    "tokens_to_map",
]
