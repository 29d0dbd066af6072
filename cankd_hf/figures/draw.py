"""Figures of maps over their image: one row a level, one column a model."""

import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from cankd_hf.figures.look import Seen
from cankd_hf.figures.maps import activation, difference, effective_keys, pca_colours
from cankd_hf.losses import CanKDLoss, attention_map
from cankd_hf.losses.affinities import AFFINITIES
from cankd_hf.tasks.pictures import any_letters
from cankd_hf.training.placing import Pair

CELL = 2.0  # inches, width of a panel: at 110 dots per inch five of them fill the report's page without scaling
DPI = 110
FONT = 10
NAMES_AS_THEY_ARE = {"text.parse_math": False}  # a `$` in the name of a file, class or term is one
HEAT = "magma"
MOST_UNLIKE = 1.5  # end of the scale of differences in every figure; unrelated maps have 1 on average


def to_png(figure: Figure) -> bytes:
    """The content of a PNG file of a figure."""
    buffer = io.BytesIO()
    with any_letters():
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def panels(rows: int, columns: int, image: np.ndarray, footer: float = 0.0) -> tuple[Figure, Any]:
    """A figure of panels with the proportions of an image [H, W, 3] (at most 2:1), and its axes [rows, columns].

    `footer`: inches to add below.
    """
    share = min(max(image.shape[0] / image.shape[1], 0.5), 2.0)
    size = (CELL * columns + 1.0, (CELL * share + 0.15) * rows + 0.5 + footer)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, axes


def overlay(axis: Any, image: np.ndarray, values: Tensor, alpha: float = 0.7, **style: Any) -> Any:
    """Draws a map [h, w] in colour over its image in grey, without interpolation. Returns the coloured layer.

    The image is mapped to middle greys, so that colours look alike over dark and bright images.
    """
    height, width = image.shape[:2]
    grey = image @ np.array([0.299, 0.587, 0.114])
    dark, bright = np.percentile(grey, [1, 99])
    grey = 0.35 + 0.4 * np.clip((grey - dark) / max(bright - dark, 1e-6), 0, 1)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0), aspect="auto")
    settings = {"interpolation": "nearest", "extent": (0, width, height, 0), "aspect": "auto", "alpha": alpha, **style}
    return axis.imshow(values.numpy(), **settings)


def label(axes: Any, rows: list[str], columns: list[str]) -> None:
    """Writes a label at the left of each row and a title above each column."""
    for axis, text in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(text, fontsize=FONT)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=FONT + 1)


def colour_bar(figure: Figure, axes: Any, shown: Any, text: str, **settings: Any) -> Any:
    """Adds a colour bar below all panels."""
    bar = figure.colorbar(shown, ax=axes, location="bottom", aspect=60, pad=0.02, **settings)
    bar.set_label(text, fontsize=FONT)
    return bar


def pair_text(seen: Seen, pair: Pair) -> str:
    """`level 2, stride 16` of the student and, where it differs, of the teacher."""
    ours = level_text(seen, pair.student, next(iter(seen.students.values()))[pair.student])
    theirs = level_text(seen, pair.teacher, seen.teacher_map(pair))
    return ours if ours == theirs else f"{ours}\n{pair.of or 'teacher'}: {theirs}"


def level_text(seen: Seen, index: int, feature_map: Tensor) -> str:
    """`level 2, stride 16`."""
    return f"level {index}, stride {seen.stride(feature_map):.3g}"


@rc_context(NAMES_AS_THEY_ARE)
def heat_maps(seen: Seen) -> Figure:
    """Activation of each level of each student and of the teachers (the paper's figure 6)."""
    # student level -> the first pair with each teacher
    partners: dict[int, dict[str, Pair]] = {}
    for pair in seen.pairs:
        partners.setdefault(pair.student, {}).setdefault(pair.of, pair)
    names = list(seen.teachers) if len(seen.teachers) > 1 else [""] * len(seen.teachers)
    titles = ["image", *seen.students, *(name or "teacher" for name in names)]
    levels = next(iter(seen.students.values()))
    figure, axes = panels(len(levels), len(titles), seen.image, footer=0.5)
    shown: Any = None
    for index, row in enumerate(axes):
        maps: list[Tensor | None] = [found[index] for found in seen.students.values()]
        found_pairs = [partners.get(index, {}).get(name) for name in names]
        maps += [None if pair is None else seen.teacher_map(pair) for pair in found_pairs]
        row[0].imshow(seen.image, interpolation="nearest", aspect="auto")
        for axis, found in zip(row[1:], maps, strict=True):
            if found is None:
                axis.text(0.5, 0.5, "no teacher level\nis paired with it", ha="center", va="center", fontsize=FONT)
                continue
            shown = overlay(axis, seen.image, activation(found), cmap=HEAT, vmin=0, vmax=1)
    texts = [level_text(seen, index, found) for index, found in enumerate(levels)]
    for level, pairs in partners.items():
        texts[level] = pair_text(seen, next(iter(pairs.values())))
    label(axes, texts, titles)
    text = "mean absolute activation over channels, scaled for each map"
    colour_bar(figure, axes, shown, text, ticks=[0, 1]).ax.set_xticklabels(["low", "high"])
    return figure


@rc_context(NAMES_AS_THEY_ARE)
def difference_maps(seen: Seen) -> Figure | None:
    """Difference of each student, after its connector, to the teacher, on one scale; None where nothing is connected.

    The last column shows the student map after the first Can block of that pair, which is what its loss compares.
    """
    columns = [(name, {pair: maps[0] for pair, maps in pairs.items()}) for name, pairs in seen.connected.items()]
    if not columns:
        return None
    last, found = next(reversed(seen.connected.items()))
    through: dict[Pair, Tensor] = {}
    for _, pair, loss in seen.losses:
        if isinstance(loss, CanKDLoss) and pair not in through:
            student, teacher = (m[None] for m in found[pair])
            through[pair] = loss.transform(student, teacher)[0].detach()
    if through:
        columns.append((f"{last},\nthrough the Can block", through))
    figure, axes = panels(len(seen.pairs), len(columns), seen.image, footer=0.6)
    shown: Any = None
    for pair, row in zip(seen.pairs, axes, strict=True):
        for (_, maps), axis in zip(columns, row, strict=True):
            if pair not in maps:
                continue
            value = difference(maps[pair], found[pair][1])
            shown = overlay(axis, seen.image, value, 0.8, cmap="viridis", vmin=0, vmax=MOST_UNLIKE)
            axis.set_xlabel(f"mean {value.mean():.2f}", fontsize=FONT)
    label(axes, [pair_text(seen, pair) for pair in seen.pairs], [title for title, _ in columns])
    text = "difference to the teacher: 0 equal, 1 as unlike as unrelated maps"
    colour_bar(figure, axes, shown, text, extend="max")
    return figure


@rc_context(NAMES_AS_THEY_ARE)
def pca_maps(seen: Seen) -> Figure:
    """The teacher's first three principal components as colours, and the students in the same basis.

    Without a teacher: the last student's own components.
    """
    if seen.connected:
        titles = ["image", "teacher", *seen.connected]
        rows = []
        for pair in seen.pairs:
            found = [maps[pair] for maps in seen.connected.values()]
            rows.append(pca_colours(found[0][1], *(student for student, _ in found)))
        texts = [pair_text(seen, pair) for pair in seen.pairs]
    else:
        name, own = next(reversed(seen.students.items()))
        titles = ["image", name]
        rows = [pca_colours(feature_map) for feature_map in own]
        texts = [level_text(seen, index, feature_map) for index, feature_map in enumerate(own)]
    figure, axes = panels(len(rows), len(titles), seen.image)
    for colours, row in zip(rows, axes, strict=True):
        for axis, picture in zip(row, [seen.image, *(found.numpy() for found in colours)], strict=True):
            axis.imshow(picture, interpolation="nearest", aspect="auto")
    label(axes, texts, titles)
    return figure


@rc_context(NAMES_AS_THEY_ARE)
def attention_maps(seen: Seen, pixel: tuple[int, int] | None = None) -> Figure | None:
    """Attention of one pixel of the last student over the teacher's map, for each CanKD term and pair.

    Args:
        seen: the maps.
        pixel: row and column in the image before it was resized; default: the centre.

    Returns:
        The figure, or None without a CanKD term.
    """
    blocks = {(term, pair): loss for term, pair, loss in seen.losses if isinstance(loss, CanKDLoss) and loss.attends}
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
            _draw_attention(figure, axis, seen, loss, attention_map(loss, student, teacher, cell))
            _mark_cell(axis, seen, (rows, columns), cell)
    titles = [f"query pixel {y}, {x}", *(_title(term, blocks, pairs) for term in terms)]
    label(axes, [pair_text(seen, pair) for pair in pairs], titles)
    return figure


def _title(term: str, blocks: dict[tuple[str, Pair], CanKDLoss], pairs: list[Pair]) -> str:
    affinity = next(blocks[term, pair].affinity for pair in pairs if (term, pair) in blocks)
    return affinity.replace("_", " ") if term in (affinity, "cankd") else f"{term}:\n{affinity.replace('_', ' ')}"


def _draw_attention(figure: Figure, axis: Any, seen: Seen, loss: CanKDLoss, values: Tensor) -> None:
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
