"""The pictures of one sample: the image, its label, and the answers of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from cankd_hf.config.data import DataConfig
from cankd_hf.tasks.pictures import denormalize
from cankd_hf.tasks.showing import Showing

Stats = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of a model's images


class Panels(NamedTuple):
    """Pictures [h, w, 3] of a sample and a caption, or an empty text, for each."""

    pictures: list[np.ndarray]
    captions: list[str]


def panels(
    task: Showing,
    sample: Mapping[str, Any],
    models: Mapping[str, PreTrainedModel],
    config: DataConfig,
    stats: Mapping[str, Stats] | None = None,
    **settings: Any,
) -> Panels:
    """The image, its label, and the answer of each model, whose modes stay as they were.

    Args:
        task: of the models.
        sample: of evaluation, with its label.
        models: by name.
        config: with the normalisation of the sample.
        stats: that of a model, by name, where it differs.
        settings: of `Showing.answer`.
    """
    pixels = sample["pixel_values"].float().cpu()
    image, truth = denormalize(pixels, config.image_mean, config.image_std), task.truth(sample)
    made = Panels([image, task.paint(image, truth, truth)], ["", task.caption(truth, truth)])
    for name, model in models.items():
        own = pixels
        if stats is not None and name in stats:
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in stats[name])
            own = (torch.from_numpy(image).permute(2, 0, 1) - mean) / std
        with evaluating(model):
            answer = task.answer(model, own, **settings)
        made.pictures.append(task.paint(image, answer, truth))
        made.captions.append(task.caption(answer, truth))
    return made


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards each module is in the mode it had, frozen BatchNorms too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
