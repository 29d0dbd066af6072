"""Decodes images and masks to tensors, the same way in checks, training, evaluation and prediction."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.io import ImageReadMode

from cankd_hf.config.data import PILLOW_LIMIT, DataConfig
from cankd_hf.data.common.files import not_a_file
from cankd_hf.data.common.labels import NO_CLASS, Labels, colour_code
from cankd_hf.data.common.targets import Mask, Target
from cankd_hf.errors import InputError

Data = Path | bytes
ORIENTATION = ExifTags.Base.Orientation
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")


class Sample(NamedTuple):
    """One decoded image."""

    image: torch.Tensor  # [3, H, W], uint8, upright
    target: Target | None  # its label, such as a `Mask`; None without labels
    name: str  # file name or place, for messages
    dropped: tuple[str, ...] = ()  # parts of its label that were left out, and why

    @property
    def label(self) -> Any:
        """The label passed to transforms: labels [H, W] of a mask, `Objects` for boxes, else None."""
        return None if self.target is None else self.target.value

    def standing_in(self) -> Sample:
        """A copy to replace a broken sample, ignored in losses and scores."""
        return self._replace(target=None if self.target is None else self.target.standing_in())


class Unusable(InputError):
    """One image or mask that cannot be used; with `data.on_error: skip` it is left out."""


class Unlabelled(Unusable):
    """One image without a label where each needs one; it is left out and counted, whatever `data.on_error` says."""


class WrongLabels(InputError):
    """A mask or a box whose labels are invalid: an error of the whole data set, never skipped."""


def is_left_out(problem: Unusable, on_error: str) -> bool:
    """Whether an image with this problem is left out, rather than stopping the run."""
    return on_error == "skip" or isinstance(problem, Unlabelled)


@dataclass
class Decoder:
    """Decodes images and masks; errors name the file and the reason."""

    max_pixels: int = PILLOW_LIMIT  # larger images are refused from their header, before any memory is allocated
    ignore_index: int = 255  # label of void
    reduce_labels: bool = False  # label 0 is void, the others are reduced by 1
    # colours of the classes, for masks that are RGB pictures: label -> (r, g, b)
    palette: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    num_labels: int | None = None  # number of classes; None: labels are not checked
    values: dict[int, int] = field(default_factory=dict)  # see `Labels`
    codes: dict[int, int] = field(default_factory=dict)

    def pair(self, image: tuple[Data, str], mask: tuple[Data, str] | None) -> Sample:
        """Decode an image and its mask, each given with its name. Raises Unusable as `image` and `mask` do, and if
        their sizes differ: crops would not match. Raises WrongLabels as `mask` does."""
        pixels = self.image(*image)
        if mask is None:
            return Sample(pixels, None, image[1])
        labels = self.mask(*mask)
        if labels.shape == pixels.shape[:0:-1] and labels.shape != pixels.shape[1:]:
            labels = _turned(labels, image[0])
        if labels.shape != pixels.shape[-2:]:
            (height, width), (rows, columns) = pixels.shape[-2:], labels.shape
            raise Unusable(
                f"{mask[1]}: expected the size of its image {image[1]}, {width} x {height} (upright), "
                f"got {columns} x {rows}; regenerate the mask at the image's size"
            )
        return Sample(pixels, Mask(labels, self.ignore_index), image[1])

    def image(self, data: Data, name: str) -> torch.Tensor:
        """Decode an image of any mode to RGB [3, H, W], uint8, upright; in memory [H, W, 3], see `RandomScaleCrop`.

        16-bit grey is scaled to 8 bit, alpha is dropped, of an animation the first frame is taken. Raises Unusable
        naming the file, if it is missing, broken, empty or too large.
        """
        found = self._open(data, name, upright=True)
        pixels = found if isinstance(found, torch.Tensor) else torch.from_numpy(_rgb_array(found, name))
        return pixels.permute(2, 0, 1)

    def mask(self, data: Data, name: str) -> torch.Tensor:
        """Decode a mask to labels [H, W], uint8 where every label and `ignore_index` fit, else int32.

        Palette PNGs give their indices. RGB pictures are mapped by the exact colours of `palette`. Raises Unusable
        naming the file, if it is missing, broken or too large. Raises WrongLabels if it holds a label outside the
        classes, or colours outside the palette.
        """
        picture = self.picture(data, name)
        if picture.mode in ("LA", "PA"):
            picture = picture.convert(picture.mode[0])
        if picture.mode == "P" and self._by_colour(picture):
            picture = picture.convert("RGB")
        if picture.mode in ("L", "P"):
            labels = np.array(picture)
        elif picture.mode == "1" or picture.mode in SIXTEEN_BIT:
            labels = np.array(picture).astype(np.int32)
        elif picture.mode in ("RGB", "RGBA"):
            labels = self._from_colours(np.array(picture)[..., :3], name)
        else:
            raise WrongLabels(f"{name}: expected a mask with one label a pixel, got an image of mode {picture.mode}")
        if self.values and picture.mode not in ("RGB", "RGBA"):
            labels = self._from_values(labels, name)
        return self._finish(labels, name)

    def picture(self, data: Data, name: str) -> Image.Image:
        """Decode a picture as it is stored. Raises Unusable naming the file, if it is missing, broken or too large."""
        found = self._open(data, name)
        assert isinstance(found, Image.Image)  # only upright images are decoded without Pillow
        return found

    def _open(self, data: Data, name: str, upright: bool = False) -> Image.Image | torch.Tensor:
        """Open and decode, after checking the size in the header; rotated by its EXIF orientation if `upright`.

        The pixels [H, W, 3] of an ordinary JPEG, if `upright`; else a picture of Pillow.
        """
        if isinstance(data, Path) and (problem := missing(data, name)):  # a FIFO would wait for a writer
            raise Unusable(problem)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                picture = Image.open(data if isinstance(data, Path) else io.BytesIO(data))
            with picture:  # closes the file; what was loaded stays
                width, height = picture.size
                if width * height > self.max_pixels:
                    raise Unusable(
                        f"{name}: {width} x {height} pixels are more than data.max_pixels = {self.max_pixels}; "
                        "shrink the image, or raise data.max_pixels if it is meant"
                    )
                pixels = _fast_jpeg(picture, data) if upright else None
                if pixels is not None:
                    return pixels
                picture.load()
            return ImageOps.exif_transpose(picture) if upright else picture
        except Image.DecompressionBombError as error:
            raise Unusable(f"{name}: {error}") from None
        except InputError:
            raise
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error ... on bad bytes
        except Exception as error:
            raise Unusable(f"{name}: expected an image that decodes, got {_why_broken(data, error)}") from None

    def _from_colours(self, colours: np.ndarray, name: str) -> np.ndarray:
        """Map an RGB picture [H, W, 3] to labels by exact colours; black without a class of its own is void."""
        if not self.palette and not self.codes:
            if (colours == colours[..., :1]).all():  # a grey picture saved as RGB: its values are the labels
                grey = colours[..., 0].copy()
                return self._from_values(grey, name) if self.values else grey
            raise WrongLabels(
                f"{name}: expected a mask with one label a pixel, got an RGB mask; "
                "save indices, or give the colour of each class as `palette` in the labels file"
            )
        red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
        pixels = (red << 16) | (green << 8) | blue
        known = self.codes
        if not known:
            if len(set(self.palette.values())) < len(self.palette):
                of = list(self.palette.values())
                twice = next(colour for colour in of if of.count(colour) > 1)
                alike = " and ".join(f"palette.{label}" for label, colour in self.palette.items() if colour == twice)
                raise WrongLabels(
                    f"{name}: expected a colour of its own for each class, as the mask is an RGB picture, got {twice} "
                    f"for {alike} of the labels file; save indices"
                )
            known = {colour_code(colour): label for label, colour in self.palette.items()}
        labels, strange = self._looked_up(pixels, {0: NO_CLASS, **known})
        if strange:
            shown = ", ".join(f"({code >> 16}, {code >> 8 & 255}, {code & 255})" for code in strange[:5])
            raise WrongLabels(
                f"{name}: RGB mask with {len(strange)} colours outside the palette of the labels file: {shown}; "
                "save masks without smoothing (PNG), or complete the palette"
            )
        return labels

    def _by_colour(self, picture: Image.Image) -> bool:
        """Whether the colours in a palette are those of `codes`, and so tell more than its indices."""
        colours = picture.getpalette("RGB") or []
        used = [colours[3 * index : 3 * index + 3] for index, count in enumerate(picture.histogram()) if count]
        return bool(self.codes) and all(colour and colour_code(colour) in self.codes for colour in used)

    def _from_values(self, values: np.ndarray, name: str) -> np.ndarray:
        """Map the values of a mask to labels."""
        labels, strange = self._looked_up(values.astype(np.int32), self.values)
        if strange:
            raise WrongLabels(
                f"{name}: expected the values {sorted(self.values)[:12]} of the labels file, got {strange[:8]}; "
                "correct the mask, or complete `values`"
            )
        return labels

    def _looked_up(self, pixels: np.ndarray, known: dict[int, int]) -> tuple[np.ndarray, list[int]]:
        """The labels of pixels [H, W], and the numbers among these that are not known."""
        shift = 1 if self.reduce_labels else 0  # these classes are final: undo the reduction that _finish will do
        keys = np.array(sorted(known), np.int32)
        table = [self.ignore_index if known[key] == NO_CLASS else known[key] + shift for key in keys.tolist()]
        places = np.searchsorted(keys, pixels).clip(max=len(keys) - 1)
        strange = np.unique(pixels[keys[places] != pixels]).tolist()
        return np.array(table, np.int32)[places], strange

    def _finish(self, labels: np.ndarray, name: str) -> torch.Tensor:
        """Apply the reduction, check the range and choose the smallest dtype that holds all labels."""
        if self.reduce_labels:
            wide = labels.astype(np.int32)  # in uint8, 0 - 1 would become 255 and 255 would become class 254
            labels = np.where((wide == 0) | (wide == self.ignore_index), self.ignore_index, wide - 1)
        if self.num_labels is not None and not (labels.dtype == np.uint8 and labels.max(initial=0) < self.num_labels):
            outside = (labels >= self.num_labels) & (labels != self.ignore_index)
            if labels.dtype != np.uint8:
                outside |= (labels < 0) & (labels != self.ignore_index)
            if outside.any():
                strange = labels[outside]
                after = " after data.reduce_labels" if self.reduce_labels else ""
                raise WrongLabels(
                    f"{name}: expected labels 0..{self.num_labels - 1} or {self.ignore_index} (void){after}, "
                    f"got {np.unique(strange)[:8].tolist()} in {len(strange)} pixels; correct the mask, "
                    "the labels file, data.ignore_index or data.reduce_labels"
                )
        small = labels.dtype == np.uint8 or (labels.min(initial=0) >= 0 and labels.max(initial=0) <= 255)
        fits = small and 0 <= self.ignore_index <= 255
        return torch.from_numpy(np.ascontiguousarray(labels, dtype=np.uint8 if fits else np.int32))


def missing(path: Path, name: str) -> str:
    """Why a path is no file that could hold an image; "" if it is one. It is not opened."""
    problem = not_a_file(path)
    if problem == "no file":
        return f"{name}: the file does not exist"
    return f"{name}: expected an image file, got {problem}" if problem else ""


def make_decoder(config: DataConfig, labels: Labels) -> Decoder:
    """The decoder for a data set."""
    num_labels = len(labels.id2label) or None
    return Decoder(
        *(config.max_pixels, labels.ignore_index, labels.reduce_labels, labels.palette, num_labels),
        values=labels.values,
        codes=labels.codes,
    )


def _turned(labels: torch.Tensor, data: Data) -> torch.Tensor:
    """Labels [H, W] of an image as it is stored, turned as the EXIF orientation of its file turns the image."""
    with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as picture:
        orientation = picture.getexif().get(ORIENTATION, 1)
    if orientation not in (5, 6, 7, 8):
        return labels
    turned = labels.T if orientation in (5, 7) else labels
    return torch.rot90(turned, {5: 0, 6: -1, 7: 2, 8: 1}[orientation]).contiguous()


def _fast_jpeg(picture: Image.Image, data: Data) -> torch.Tensor | None:
    """The pixels [H, W, 3], uint8, of a JPEG that Pillow has opened: the same as Pillow's, without its copies.

    None where Pillow has to decode: another format, CMYK, rotated by EXIF, a torchvision without the operator, or a
    file that it does not finish, for which Pillow decides and says what is wrong.
    """
    if picture.format != "JPEG" or picture.mode not in ("RGB", "L") or picture.getexif().get(ORIENTATION, 1) != 1:
        return None
    content = data.read_bytes() if isinstance(data, Path) else data
    try:  # the operator itself: its Python function warns at each call that a later torchvision may leave it out
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return torch.ops.image.decode_jpeg(encoded, ImageReadMode.RGB.value, False).permute(1, 2, 0)
    except (RuntimeError, AttributeError):
        return None


def _rgb_array(picture: Image.Image, name: str) -> np.ndarray:
    """[H, W, 3], uint8, from a decoded picture of any mode."""
    if picture.mode in SIXTEEN_BIT:
        values = np.array(picture).astype(np.float32)
        if picture.mode != "I" or values.max(initial=0) > 255:  # convert("RGB") would clip all of it to white
            values /= 257
        grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode == "F":
        raise Unusable(f"{name}: expected 8 or 16 bits a channel, got floating point values; save it as PNG or JPEG")
    if "transparency" in picture.info and picture.mode in ("P", "L", "RGB"):
        picture = picture.convert("RGBA")  # straight to RGB warns for each image
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _why_broken(data: Data, error: Exception) -> str:
    """The reason in words: empty, a Git LFS pointer, a web page, or the decoder's message."""
    if isinstance(error, OSError) and error.strerror:  # no permission, a disk that fails
        return error.strerror
    if isinstance(data, Path):
        with data.open("rb") as file:
            head = file.read(200)
    else:
        head = data[:200]
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page; download the file again"
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image format that Pillow reads"
    return f"a broken file ({error})"
