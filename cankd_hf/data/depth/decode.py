"""Decodes depth maps to metres: PNG of 16 bits, TIFF of floating point numbers, npy."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from cankd_hf.config.data import DataConfig, DepthConfig
from cankd_hf.data.common.decode import Data, Decoder, Sample, Unlabelled, Unusable, WrongLabels, missing
from cankd_hf.data.common.targets import DepthMap

NPY = b"\x93NUMPY"  # the first bytes of an npy file
MILLIMETRES = 1000.0  # to a metre: the usual unit of whole numbers


@dataclass
class DepthDecoder(Decoder):
    """Decodes images and depth maps; errors name the file and the reason."""

    noun: ClassVar[str] = "depth map"
    depth: DepthConfig = field(default_factory=DepthConfig)

    def pair(self, image: tuple[Data, str], mask: tuple[Data, str] | None) -> Sample:
        """Decode an image and its depth map, each given with its name. Raises Unusable as `image` and `metres` do, and
        if their sizes differ; Unlabelled for a map without any depth; WrongLabels as `metres` does."""
        pixels = self.image(*image)
        if mask is None:
            return Sample(pixels, None, image[1])
        depth = self.metres(*mask)
        if depth.shape != pixels.shape[-2:]:
            (height, width), (rows, columns) = pixels.shape[-2:], depth.shape
            raise Unusable(
                f"{mask[1]}: expected the size of its image {image[1]}, {width} x {height} (upright), got {columns} x "
                f"{rows}; resize the depth map to the image, by its nearest neighbours"
            )
        if not (depth > 0).any():
            limit = f" and {self.depth.max:g}" if self.depth.max is not None else " m and no limit"
            raise Unlabelled(f"{mask[1]}: no pixel has a depth between {self.depth.min:g}{limit}")
        return Sample(pixels, DepthMap(depth), image[1])

    def metres(self, data: Data, name: str) -> torch.Tensor:
        """Decode a depth map to metres [H, W], float32; 0 where it is 0, not finite, or outside of `min` and `max`.

        Raises Unusable naming the file, if it is missing, broken or too large. Raises WrongLabels for a picture with
        colours, and for one of 8 bits without `scale`, whose numbers are hardly distances.
        """
        values = self._array(data, name)
        scale = self.depth.scale
        if scale is None:
            if values.dtype.itemsize == 1:
                raise WrongLabels(
                    f"{name}: expected a depth map of 16 bits or of floating point numbers, got one of 8 bits, which "
                    "is rather a picture of one; if its numbers are distances, set data.depth.scale"
                )
            scale = 1.0 if values.dtype.kind == "f" else MILLIMETRES
        metres = values.astype(np.float64) / scale
        limit = np.inf if self.depth.max is None else self.depth.max
        known = np.isfinite(metres) & (metres >= self.depth.min) & (metres <= limit)
        return torch.from_numpy(np.where(known, metres, 0).astype(np.float32))

    def _array(self, data: Data, name: str) -> np.ndarray:
        """The numbers of a depth map [H, W] as they are stored."""
        npy = data.suffix == ".npy" if isinstance(data, Path) else data.startswith(NPY)
        if npy:
            return self._npy(data, name)
        picture = self.picture(data, name)
        values = np.array(picture)
        if values.ndim != 2 or picture.mode in ("P", "1"):
            raise WrongLabels(
                f"{name}: expected a depth map with one number a pixel, got an image of mode {picture.mode}; save the "
                "distances themselves, as PNG of 16 bits or npy"
            )
        return values

    def _npy(self, data: Data, name: str) -> np.ndarray:
        if isinstance(data, Path) and (problem := missing(data, name)):
            raise Unusable(problem)
        try:
            # mapped: the size is known before any memory is taken
            values = np.load(data, mmap_mode="r") if isinstance(data, Path) else np.load(io.BytesIO(data))
        except Exception as error:  # whatever the bytes make of numpy
            raise Unusable(f"{name}: expected an array of numpy, got a file that does not load ({error})") from None
        if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):  # with an axis of channels
            values = values[0] if values.shape[0] == 1 else values[..., 0]
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise WrongLabels(
                f"{name}: expected numbers [H, W], got an array {list(values.shape)} of {values.dtype}; save one "
                "number a pixel"
            )
        if values.size > self.max_pixels:
            raise Unusable(
                f"{name}: {values.shape[1]} x {values.shape[0]} pixels are more than data.max_pixels = "
                f"{self.max_pixels}; shrink it with its image, or raise data.max_pixels if it is meant"
            )
        return np.asarray(values)


def depth_decoder(config: DataConfig) -> DepthDecoder:
    """The decoder for a data set."""
    return DepthDecoder(config.max_pixels, depth=config.depth)
