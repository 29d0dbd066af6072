"""Feature maps from any model: taps, grids, pairs, connectors, similarity."""

from cankd_hf.features.connectors import Connector
from cankd_hf.features.grids import resize_map, to_maps, tokens_to_map
from cankd_hf.features.pairing import describe_levels, pair_levels
from cankd_hf.features.similarity import channel_correlation, linear_cka
from cankd_hf.features.taps import Level, Taps

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
