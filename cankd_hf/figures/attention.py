"""The attention of one student pixel over the teacher's map (the paper's figure 5)."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from cankd_hf.figures.draw import FONT, HEAT, label, overlay, pair_text, panels
from cankd_hf.figures.look import Seen
from cankd_hf.figures.maps import effective_keys
from cankd_hf.losses import CanKDLoss, attention_map
from cankd_hf.losses.affinities import AFFINITIES
from cankd_hf.training.placing import Pair


def attention_maps(seen: Seen, pixel: tuple[int, int] | None = None) -> Figure | None:
    """Attention of one pixel of the last student over the teacher's map, for each CanKD term and pair.

    Args:
        seen: the maps.
        pixel: row and column in the image before it was resized; default: the centre.

    Returns:
        The figure, or None without a CanKD term.
    """
    blocks = {(term, pair): loss for term, pair, loss in seen.losses if isinstance(loss, CanKDLoss)}
    if not blocks:
        return None
    height, width = seen.size
    y, x = pixel if pixel is not None else (height // 2, width // 2)
    terms = list(dict.fromkeys(term for term, _ in blocks))
    pairs = sorted({pair for _, pair in blocks})
    maps = next(reversed(seen.connected.values()))
    figure, axes = panels(len(pairs), 1 + len(terms), seen.image, footer=0.3 * len(pairs))
    for pair, row in zip(pairs, axes, strict=True):
        student, teacher = maps[pair]
        rows, columns = student.shape[1:]
        cell = (y * rows // height, x * columns // width)
        row[0].imshow(seen.image, extent=(0, seen.image.shape[1], seen.image.shape[0], 0), aspect="auto")
        _mark_cell(row[0], seen, (rows, columns), cell)
        for term, axis in zip(terms, row[1:], strict=True):
            if (term, pair) not in blocks:
                axis.text(0.5, 0.5, "not compared\nby this term", ha="center", va="center", fontsize=FONT)
                continue
            loss = blocks[term, pair]
            _draw(figure, axis, seen, loss, attention_map(loss, student, teacher, cell))
            _mark_cell(axis, seen, (rows, columns), cell)
    titles = [f"query pixel {y}, {x}", *(_title(term, blocks, pairs) for term in terms)]
    label(axes, [pair_text(seen, pair) for pair in pairs], titles)
    return figure


def _title(term: str, blocks: dict[tuple[str, Pair], CanKDLoss], pairs: list[Pair]) -> str:
    affinity = next(blocks[term, pair].affinity for pair in pairs if (term, pair) in blocks)
    return affinity.replace("_", " ") if term in (affinity, "cankd") else f"{term}:\n{affinity.replace('_', ' ')}"


def _draw(figure: Figure, axis: Any, seen: Seen, loss: CanKDLoss, values: Tensor) -> None:
    """One attention map with its own colour bar, as the affinities have no common unit."""
    style: dict[str, Any]
    value_range = AFFINITIES[loss.affinity].value_range
    if value_range == "signed":
        limit = float(values.abs().max()) or 1.0
        style = {"cmap": "PuOr", "vmin": -limit, "vmax": limit, "alpha": 0.85}
        note = "of either sign"
    else:
        style = {"cmap": HEAT, "vmin": 0, "vmax": float(values.max()) or 1.0}
        note = "at least 0" if values.any() else "0 everywhere: it reads nothing"
    shown = overlay(axis, seen.image, values, **style)
    if value_range == "softmax":
        note = f"spread over {effective_keys(values):.3g} of {values.numel()} keys"
    bar = figure.colorbar(shown, ax=axis, location="bottom", aspect=30, pad=0.02, fraction=0.06)
    bar.ax.ticklabel_format(axis="x", scilimits=(-2, 3))
    bar.ax.locator_params(nbins=3)
    bar.ax.tick_params(labelsize=FONT - 2)
    bar.ax.xaxis.get_offset_text().set_fontsize(FONT - 2)
    axis.set_xlabel(note, fontsize=FONT - 1)


def _mark_cell(axis: Any, seen: Seen, grid: tuple[int, int], cell: tuple[int, int]) -> None:
    """A frame of fixed size, visible on any background, at the middle of the query's cell."""
    height, width = seen.image.shape[:2]
    tall, wide = height / grid[0], width / grid[1]
    y, x = (cell[0] + 0.5) * tall, (cell[1] + 0.5) * wide
    for colour, line in (("black", 3.5), ("white", 1.5)):
        axis.plot([x], [y], "s", markersize=10, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=line)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
