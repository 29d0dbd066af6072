"""Parts of pictures of predictions."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cankd_hf._moved import left

__getattr__ = left(__name__, "tasks.pictures", "shown", "spread")
ROWS = 4  # samples in a picture


def sample_evenly(data: Any, count: int) -> list[Any]:
    """`count` samples spread over a data set (the first ones of a stream)."""
    if not hasattr(data, "__len__"):
        return list(islice(iter(data), count))
    positions = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    return [data[int(position)] for position in positions]


def class_colours(count: int, palette: Mapping[int, Sequence[int]] | None) -> np.ndarray:
    """One RGB colour per class, uint8 [count, 3]: the data set's own, or well separated ones."""
    if palette is not None and all(label in palette for label in range(count)):
        return np.asarray([palette[label] for label in range(count)], dtype=np.uint8)
    import matplotlib

    name = "tab10" if count <= 10 else "tab20" if count <= 20 else "gist_ncar"
    steps = np.arange(count) if count <= 20 else np.linspace(0.03, 0.97, count)
    return (matplotlib.colormaps[name](steps)[:, :3] * 255).astype(np.uint8)


def denormalize(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Undoes the normalisation of an image [3, H, W]; returns [H, W, 3] in 0..1."""
    image = pixel_values * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


@contextmanager
def any_letters() -> Iterator[None]:
    """Saves figures whose names have letters that the font lacks, drawn as boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def as_image(picture: np.ndarray) -> Image.Image:
    """A picture [h, w, 3], of 0..1 or uint8."""
    if picture.dtype != np.uint8:
        picture = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(picture))


def fitted(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A picture at this width and height: enlarged without blur, made smaller by means."""
    image = as_image(picture)
    how = Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.BOX
    return image if image.size == size else image.resize(size, how)


@cache
def font(size: int) -> Any:
    """The font of matplotlib, which has the letters of more languages than Pillow's own."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def draw_grid(
    file: Path,
    titles: Sequence[str],
    rows: Sequence[Sequence[np.ndarray]],
    legend: Sequence[tuple[str, Any]] = (),
    heading: str = "",
    captions: Sequence[Sequence[str]] = (),
    width: int = 300,
) -> Image.Image:
    """Writes a PNG with a grid of pictures, one sample a row; takes some hundredths of a second.

    Args:
        file: where to; written aside and renamed, so that who looks never sees a part of it.
        titles: of the columns.
        rows: the pictures of each sample, [h, w, 3]; the first gives the row its shape.
        legend: names and colours, as matplotlib reads them.
        heading: a line above all.
        captions: a line below each picture of each row; none where all of a row are empty.
        width: of a column, in pixels.
    """
    from matplotlib.colors import to_rgb

    gap, text, line = 6, font(13), 20
    heights = [max(1, round(width * row[0].shape[0] / row[0].shape[1])) for row in rows]
    below = [line if any(found) else 0 for found in captions] or [0] * len(rows)
    total = gap + (width + gap) * len(titles)
    entries = _in_lines([(name, to_rgb(colour)) for name, colour in legend], text, total)
    top = gap + (line if heading else 0) + line
    height = top + sum(heights) + sum(below) + gap * len(rows) + line * len(entries) + gap
    page = Image.new("RGB", (total, height), "white")
    pen = ImageDraw.Draw(page)
    pen.text((gap, gap), _cut(heading, text, total - 2 * gap), "black", text)
    for column, title in enumerate(titles):
        centre = gap + column * (width + gap) + width / 2
        pen.text((centre, top - 3), _cut(title, text, width), "black", text, anchor="md")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            left = gap + column * (width + gap)
            page.paste(fitted(picture, (width, heights[number])), (left, top))
            if below[number]:
                said = _cut(captions[number][column], text, width)
                pen.text((left + width / 2, top + heights[number] + 2), said, "black", text, anchor="ma")
        top += heights[number] + below[number] + gap
    for found in entries:
        left = gap
        for name, colour, wide in found:
            pen.rectangle((left, top + 4, left + 18, top + 14), tuple(round(255 * part) for part in colour), "#888")
            pen.text((left + 23, top + 1), name, "black", text)
            left += wide
        top += line
    partial = file.with_name(f".{file.name}.partial")
    page.save(partial, "PNG")
    partial.replace(file)
    return page


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str, letters: Any, width: int) -> str:
    """One line of text that is not wider than this."""
    text = _one_line(text)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _in_lines(legend: Sequence[tuple[str, Any]], letters: Any, width: int) -> list[list[tuple[str, Any, int]]]:
    """Entries of a legend with their widths, in lines that are not wider than the page."""
    lines: list[list[tuple[str, Any, int]]] = []
    left = width
    for name, colour in legend:
        name = _cut(name, letters, 200)
        wide = 23 + round(letters.getlength(name)) + 18
        if left + wide > width:
            lines.append([])
            left = 6
        lines[-1].append((name, colour, wide))
        left += wide
    return lines
