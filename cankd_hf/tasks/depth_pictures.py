"""Pictures of depth maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from cankd_hf.config.data import DataConfig
from cankd_hf.tasks.pictures import ROWS, any_letters, denormalize, sample_evenly

if TYPE_CHECKING:
    from cankd_hf.tasks.depth import DepthTask

COLOURS = "turbo_r"  # near is red, far is blue
CELL = 2.6  # inches


def range_of(truth: np.ndarray) -> tuple[float, float]:
    """The nearest and the farthest distance in metres that have a colour of their own: of the true depth, without the
    outermost hundredth at either end."""
    known = truth[truth > 0]
    low, high = np.percentile(known, [1, 99]) if len(known) else (0.0, 1.0)
    return float(low), float(max(high, low * 1.001 + 1e-6))


def painted(metres: np.ndarray, truth: np.ndarray, hide: bool = False) -> np.ndarray:
    """A depth map in colours, uint8 [H, W, 3], in the range of the truth; with `hide`, black where that has none."""
    import matplotlib

    low, high = range_of(truth)
    shares = np.clip((metres - low) / (high - low), 0, 1)
    colours = (255 * matplotlib.colormaps[COLOURS](shares)[..., :3]).astype(np.uint8)
    return np.where((truth > 0)[..., None], colours, np.uint8(0)) if hide else colours


def draw_depths(
    task: DepthTask, data: Any, models: Mapping[str, PreTrainedModel], file: Path, config: DataConfig
) -> None:
    """Writes a PNG with one sample a row: image, true depth and those of the models in colours, and their scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    titles, rows, ranges = ["image", "true depth", *models], [], []
    for sample in sample_evenly(data, ROWS):
        truth = task.truth(sample)
        answers = [task.answer(model.eval(), sample["pixel_values"]) for model in models.values()]
        maps = [task.paint(np.empty(0), answer, truth) for answer in (truth, *answers)]
        captions = ["", *(task.caption(answer, truth) for answer in answers)]
        image = denormalize(sample["pixel_values"], config.image_mean, config.image_std)
        rows.append(list(zip([image, *maps], ["", *captions], strict=True)))
        ranges.append(range_of(truth[0].numpy()))
    shares = [row[0][0].shape[0] / row[0][0].shape[1] for row in rows]
    size = (CELL * len(titles) + 0.9, CELL * sum(shares) + 0.3 * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=shares)
    with any_letters():
        for row, (parts, (low, high)) in enumerate(zip(rows, ranges, strict=True)):
            for axis, (picture, caption) in zip(axes[row], parts, strict=True):
                axis.imshow(picture, interpolation="nearest", aspect="auto")
                axis.set_xlabel(caption, fontsize=9)
                axis.set_xticks([])
                axis.set_yticks([])
            scale = figure.colorbar(ScalarMappable(Normalize(low, high), COLOURS), ax=list(axes[row]), pad=0.01)
            scale.set_label("metres", fontsize=9)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=11)
        figure.savefig(file, dpi=110)
