"""Cutting maps into blocks that stay in a cache, so that temporaries never grow with the map."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Values of one map handled at once: on the CPU a block and its temporaries should stay in the cache of a core, on a
# GPU a block should fill the device while its temporaries stay small beside the maps.
BLOCK_CPU = 1 << 17
BLOCK_GPU = 1 << 21


def blocks(device: torch.device, batch: int, length: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut [batch, length] units of `width` values each into (images, units) blocks."""
    values = BLOCK_CPU if device.type == "cpu" else BLOCK_GPU
    if torch.compiler.is_compiling():
        # the loop is unrolled into the graph: a few large blocks
        values = max(values, batch * length * width // 4)
    units = max(1, min(length, values // width))
    images = max(1, values // (width * length)) if units == length else 1
    for image in range(0, batch, images):
        for unit in range(0, length, units):
            yield slice(image, min(image + images, batch)), slice(unit, min(unit + units, length))
