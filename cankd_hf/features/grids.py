"""Converts module outputs to feature maps `[B, C, H, W]`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cankd_hf.errors import InputError

# Strides of hierarchical models; then all others, for models whose configuration has no patch size.
_USUAL = (16, 32, 8, 4, 2, 64, 1)
_ANY = (16, 14, 32, 8, 4, 2, 64, 1, *(s for s in range(3, 64) if s not in (4, 8, 14, 16, 32)))
# CLS and registers; then also the queries that EoMT puts before the patches.
_PREFIX, _QUERIES = 8, 1024
# Of a model output only these hold the maps a later stage reads; everything else (attentions, logits) is left out.
_OUTPUT_KEYS = ("feature_maps", "last_hidden_state")


def infer_grid(tokens: int, image_size: tuple[int, int], patch_size: int | None = None) -> tuple[int, int] | None:
    """Infers rows and columns of a sequence of `tokens` with its prefix (CLS, registers); None when no grid fits.

    A known patch size (pixels per token) is tried first; otherwise the fewest prefix tokens win, because 197 tokens of
    a 224 x 224 image are 14 x 14 + 1 and not 13 x 13 + 28.
    """
    height, width = image_size
    own: tuple[int, ...] = () if patch_size is None else (patch_size,)
    attempts: list[tuple[tuple[int, ...], int]] = [(own, _PREFIX), (_USUAL, 0), (own, _QUERIES)]
    attempts += [(_ANY, most) for most in (0, 1, 5, 32)]
    for strides, most in attempts:
        for stride in strides:
            # Pixels left over are dropped (patches) or padded (convolutions).
            for h, w in ((height // stride, width // stride), (-(-height // stride), -(-width // stride))):
                if h * w > 0 and 0 <= tokens - h * w <= most:
                    return h, w
    return None


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshapes tokens `[B, N, C]` to a map `[B, C, h, w]`, dropping the prefix tokens (CLS, registers) at their start.
    Raises ValueError if N < h * w."""
    height, width = grid
    batch, count, channels = tokens.shape
    if count < height * width:
        raise ValueError(f"{count} tokens cannot fill a grid of {height} x {width}")
    patches = tokens[:, count - height * width :]
    return patches.transpose(1, 2).reshape(batch, channels, height, width)


def to_maps(output: Any, image_size: tuple[int, int], patch_size: int | None = None) -> list[Tensor]:
    """Extracts the feature maps `[B, C, H, W]` of a module's output, in the order in which it holds them.

    Understands tensors `[B, C, H, W]`, channels-last `[B, H, W, C]`, tokens `[B, N, C]`, and any nesting of them in
    model outputs, dicts, lists and tuples. Masks and other tensors that are not maps are skipped.

    Args:
        output: what the module returned.
        image_size: height and width in pixels of the model's input.
        patch_size: pixels per token, if known.

    Raises:
        InputError: if the output contains no feature map.
    """
    maps = list(_find_maps(output, image_size, patch_size))
    if not maps:
        raise InputError(
            "taps: expected feature maps [B, C, H, W] or tokens [B, N, C] of an image of "
            f"{image_size[0]} x {image_size[1]}, got {_describe(output)}; fix: name another module, or one item of "
            "its output as 'module.path:KEY'"
        )
    return maps


def logits_of(output: Any) -> Tensor | None:
    """The logits in a model's output, if it has any."""
    found = output.get("logits") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


def class_count(logits_shape: Sequence[int]) -> int:
    """K of logits `[B, K, ...]`, or of the `[B, N, K]` of a set of N queries."""
    return logits_shape[2] if len(logits_shape) == 3 else logits_shape[1]


def resize_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map `[B, C, H, W]` bilinearly, with anti-aliasing where it shrinks; equal sizes return the map."""
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    shrinks = size[0] < height or size[1] < width
    # The anti-aliasing kernel of the CPU does not support half precision.
    wide = x.float() if shrinks and x.dtype in (torch.bfloat16, torch.float16) else x
    if x.device.type == "cpu" and not shrinks:
        # torch enlarges maps with channels last several times faster there; with anti-aliasing it is slower
        wide = wide.contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(wide, size=tuple(size), mode="bilinear", align_corners=False, antialias=shrinks)
    return resized.to(x.dtype)


def _find_maps(output: Any, image_size: tuple[int, int], patch_size: int | None) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        found = _tensor_to_map(output, image_size, patch_size)
        if found is not None:
            yield found
    elif isinstance(output, Mapping):
        for key in _OUTPUT_KEYS:
            if output.get(key) is not None:
                yield from _find_maps(output[key], image_size, patch_size)
                return
        for value in output.values():
            yield from _find_maps(value, image_size, patch_size)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _find_maps(value, image_size, patch_size)


def _tensor_to_map(x: Tensor, image_size: tuple[int, int], patch_size: int | None) -> Tensor | None:
    if not torch.is_floating_point(x):
        return None
    if x.ndim == 4:
        last = not _fits(x.shape[2:], image_size) and _fits(x.shape[1:3], image_size)
        return x.permute(0, 3, 1, 2) if last else x
    if x.ndim == 3:
        grid = infer_grid(x.shape[1], image_size, patch_size)
        return None if grid is None else tokens_to_map(x, grid)
    return None


def _fits(size: Sequence[int], image_size: tuple[int, int]) -> bool:
    """Whether a grid has the image's aspect ratio, up to the cell that rounding costs on either side."""
    height, width = size
    stride = image_size[0] / height
    return abs(width - image_size[1] / stride) <= 1 + width / height and height <= 2 * image_size[0]


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)} of {output.dtype}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, output)) or 'nothing'}"
    return type(output).__name__
