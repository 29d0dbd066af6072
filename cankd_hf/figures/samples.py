"""Pictures of a data set with their labels drawn over them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cankd_hf.data.common.decode import Sample
from cankd_hf.figures.draw import NAMES_AS_THEY_ARE
from cankd_hf.tasks.overview import Overview
from cankd_hf.tasks.pictures import any_letters

COLUMNS, CELL, LONGEST = 4, 3.1, 480  # pictures in a row, inches, pixels
TITLE = 44  # characters of a line


def draw_samples(file: Path, heading: str, pictures: Sequence[tuple[str, Sample]], overview: Overview) -> None:
    """Writes a PNG with pictures of a set, four in a row, and a legend of their classes.

    Args:
        file: where to.
        heading: above them.
        pictures: (split, sample).
        overview: draws labels.

    Raises:
        OSError: where the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    shapes = [sample.image.shape[-2] / sample.image.shape[-1] for _, sample in pictures]
    share = min(1.5, max(0.4, float(np.median(shapes))))
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    legend = overview.legend([sample for _, sample in pictures])
    width = max(2, columns) * CELL
    across = max(1, int(width / (0.35 + 0.085 * max((len(name[:28]) for name, _ in legend), default=1))))
    bottom = 0.24 * -(-len(legend) // across) + (0.1 if legend else 0)
    with any_letters(), rc_context(NAMES_AS_THEY_ARE):
        engine = ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.04, wspace=0.0, hspace=0.0)
        figure = Figure(figsize=(width, rows * (CELL * share + 0.24) + 0.4 + bottom), layout=engine)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
            axis.set_anchor("N")
        for axis, (split, sample) in zip(axes, pictures, strict=False):
            overview.draw(axis, _small(sample), sample)
            title = textwrap.wrap(
                f"{split}: {sample.name.removeprefix(split + '/')}", TITLE, max_lines=2, placeholder="…"
            )
            axis.set_title("\n".join(title), fontsize=8, color="0.25", pad=3)
        figure.suptitle("\n".join(textwrap.wrap(heading, int(width * 8.5))), fontsize=12, weight="bold")
        if legend:
            handles = [Patch(facecolor=colour, edgecolor="0.4", lw=0.4, label=name[:28]) for name, colour in legend]
            place = {"loc": "outside lower center", "ncols": -(-len(handles) // -(-len(handles) // across))}
            figure.legend(handles=handles, fontsize=9, frameon=False, handlelength=1.2, **place)
        figure.savefig(file, dpi=130, facecolor="w")


def _small(sample: Sample) -> np.ndarray:
    """The image [h, w, 3], uint8, of at most 480 pixels."""
    pixels = sample.image.permute(1, 2, 0).numpy()
    factor = LONGEST / max(pixels.shape[:2])
    if factor >= 1:
        return pixels
    size = max(1, round(pixels.shape[1] * factor)), max(1, round(pixels.shape[0] * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
