"""Cutting maps into blocks that stay in a cache, so that temporaries never grow with the map."""

from collections.abc import Iterator

import torch

# Values of one map handled at once. On the CPU, for each thread: a block and its temporaries should stay in the cache
# of a core. On a GPU a block should fill the device while its temporaries stay small beside the maps (not measured).
BLOCK_CPU = 1 << 17
BLOCK_GPU = 1 << 21
BLOCKWISE = frozenset({"cpu"})  # devices on which losses compute block by block
PARTS = 16  # more threads make blocks larger only where a map still has this many of them: memory stays small


def on_whole_maps(device: torch.device) -> bool:
    """Whether losses compute on whole maps, in few operations: on devices where each operation is a launch."""
    return device.type not in BLOCKWISE


def blocks(device: torch.device, batch: int, length: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut [batch, length] units of `width` values each into (images, units) blocks."""
    values, total = BLOCK_GPU, batch * length * width
    if torch.compiler.is_compiling():
        # the loop is unrolled into the graph: a few large blocks
        values = max(values, total // 4)
    elif device.type == "cpu":
        values = max(BLOCK_CPU, min(BLOCK_CPU * torch.get_num_threads(), total // PARTS))
    units = max(1, min(length, values // width))
    images = max(1, values // (width * length)) if units == length else 1
    for image in range(0, batch, images):
        for unit in range(0, length, units):
            yield slice(image, min(image + images, batch)), slice(unit, min(unit + units, length))
