"""Pictures of predictions beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

VOID = (0, 0, 0)


def sample_evenly(data: Any, count: int) -> list[Any]:
    """`count` samples from all over a data set (the first ones of a stream)."""
    if not hasattr(data, "__len__"):
        return list(islice(iter(data), count))
    positions = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    return [data[int(position)] for position in positions]


def class_colours(count: int, palette: Mapping[int, Sequence[int]] | None) -> np.ndarray:
    """One RGB colour a class, uint8 [count, 3]: the data set's own, or well separated ones."""
    if palette is not None and all(label in palette for label in range(count)):
        return np.asarray([palette[label] for label in range(count)], dtype=np.uint8)
    import matplotlib

    name = "tab10" if count <= 10 else "tab20" if count <= 20 else "gist_ncar"
    steps = np.arange(count) if count <= 20 else np.linspace(0.03, 0.97, count)
    return (matplotlib.colormaps[name](steps)[:, :3] * 255).astype(np.uint8)


def denormalize(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image [3, H, W] as it looks, [H, W, 3] in 0..1."""
    image = pixel_values * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


@torch.no_grad()
def _predicted(model: PreTrainedModel, pixel_values: Tensor, size: Sequence[int]) -> np.ndarray:
    model.eval()
    logits = model(pixel_values=pixel_values[None].to(model.device, model.dtype)).logits.float()
    logits = functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
    return logits[0].argmax(dim=0).cpu().numpy()


def draw_segmentation(
    id2label: Mapping[int, str],
    colours: np.ndarray,
    ignore_index: int,
    data: Any,
    models: Mapping[str, PreTrainedModel],
    file: Path,
    mean: Sequence[float],
    std: Sequence[float],
    rows: int = 4,
) -> None:
    """Writes a grid: image, ground truth and each model's prediction, one sample a row, classes named below.

    Pixels without a label are black in the truth, and in the predictions too, since nothing is asked of them there.

    Args:
        id2label: names of the classes.
        colours: uint8 [K, 3], see `class_colours`.
        ignore_index: label of pixels that do not count.
        data: data set of `pixel_values` [3, H, W] and `labels` [h, w].
        models: the models by the name to write above their column, all taking the same normalisation.
        file: the PNG to write.
        mean: of the normalisation to undo, per channel.
        std: the same.
        rows: how many samples.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    samples = sample_evenly(data, rows)
    titles = ["image", "ground truth", *models]
    height, width = samples[0]["pixel_values"].shape[-2:]
    cell = 2.6  # inches
    figure = Figure(figsize=(cell * len(titles), cell * height / width * len(samples) + 0.9), layout="constrained")
    axes = figure.subplots(len(samples), len(titles), squeeze=False)
    for row, sample in zip(axes, samples, strict=True):
        truth = np.asarray(sample["labels"])
        counted = truth != ignore_index
        maps = [truth] + [_predicted(model, sample["pixel_values"], truth.shape) for model in models.values()]
        pictures = [denormalize(sample["pixel_values"], mean, std)]
        for labels in maps:
            painted = colours[np.clip(labels, 0, len(colours) - 1)]
            painted[~counted] = VOID
            pictures.append(painted)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=11)
    present = sorted(id2label)[:24]
    handles = [Patch(color=colours[label] / 255, label=id2label[label]) for label in present]
    if any((np.asarray(sample["labels"]) == ignore_index).any() for sample in samples):
        handles.append(Patch(color="k", label="no label"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), fontsize=9, frameon=False)
    figure.savefig(file, dpi=120)
