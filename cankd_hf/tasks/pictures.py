"""Parts of pictures of predictions."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def draw_grid(
    file: Path,
    titles: Sequence[str],
    rows: Sequence[Sequence[np.ndarray]],
    legend: Sequence[tuple[str, Any]],
    cell: float,
    mark: Callable[[Any, int, int], None] | None = None,
    **settings: Any,
) -> None:
    """Writes a PNG with a grid of pictures, one sample a row.

    Args:
        file: where to.
        titles: of the columns.
        rows: the pictures of each sample, [H, W, 3]; the first gives the row its shape.
        legend: names and colours.
        cell: width of a column in inches.
        mark: draws on a picture, called with (axis, row, column).
        settings: of the legend.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shares = [row[0].shape[0] / row[0].shape[1] for row in rows]
    figure = Figure(figsize=(cell * len(titles), cell * sum(shares) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=shares)
    for (row, column), axis in np.ndenumerate(axes):
        axis.imshow(rows[row][column], interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        if mark is not None:
            mark(axis, row, column)
    with any_letters(), rc_context({"text.parse_math": False}):  # a `$` in a name is one
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=11)
        handles = [Patch(color=colour, label=name) for name, colour in legend]
        settings["ncols"] = min(len(handles), settings.get("ncols", 9))
        figure.legend(handles=handles, loc="outside lower center", fontsize=9, frameon=False, **settings)
        figure.savefig(file, dpi=120)
