"""The teacher: a model with a head, and how it reads images."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize_image
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar

from cankd_hf.config.data import DataConfig
from cankd_hf.config.reading import load_data_config
from cankd_hf.data.common.transforms import Normalize
from cankd_hf.data.detection.transforms import size_of_scale_one
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import InputRule, image_stats, input_rule
from cankd_hf.hub.files import read_json
from cankd_hf.models.finite import named, not_finite
from cankd_hf.models.torchvision_heads import TorchvisionHead
from cankd_hf.names import RECIPE_FILE, TORCHVISION
from cankd_hf.tasks import TASKS, Task, saved_task
from cankd_hf.tasks.base import class_labels


@dataclass
class LabelTeacher:
    """A teacher as it labels.

    Attributes:
        name: folder, Hub id or `torchvision/NAME`.
        task: its task.
        model: `pixel_values` [B, 3, h, w] -> outputs with `logits`.
        model_type: decides how its outputs are read.
        id2label: its classes, 0..K-1.
        config: how images are resized and normalised.
        rule: the sizes it takes.
    """

    name: str
    task: type[Task]
    model: nn.Module
    model_type: str
    id2label: dict[int, str]
    config: DataConfig
    rule: InputRule

    def read(self, image: Tensor) -> Tensor:
        """An image [3, H, W] uint8 as the model takes it: resized as in evaluation, and normalised."""
        config, own = self.config, (image.shape[-2], image.shape[-1])
        size = self.rule.size(size_of_scale_one(own, config.image_size, config.keep_aspect))
        if size != own:
            image = resize_image(image, list(size), antialias=True)
        return Normalize(config.image_mean, config.image_std)(image)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], device: torch.device) -> Any:
        """The outputs for images of one size."""
        return self.model(pixel_values=torch.stack(list(images)).to(device))

    def fingerprint(self) -> str:
        """128-bit hash over names and values of all weights and buffers."""
        found = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def open_teacher(
    name: str, size: Sequence[int] | None, weights: str | None, names: Mapping[int, str] | None
) -> LabelTeacher:
    """Loads a teacher.

    Args:
        name: a folder or Hub id of a model with a head, or `torchvision/NAME`.
        size: height and width to resize images to, instead of its own.
        weights: a file for `torchvision/NAME`.
        names: classes of the labelled set, for weights that come without names.

    Raises:
        InputError: if there is none, it has no head that gives labels, or its weights are not finite.
    """
    disable_progress_bar()
    if weights is not None and not name.startswith(TORCHVISION):
        raise InputError(f"--weights: expected torchvision/NAME as the teacher beside it, got {name!r}; leave it out")
    made = _of_torchvision(name, weights, names) if name.startswith(TORCHVISION) else _of_transformers(name)
    made.task.labelling()  # raises for a task without labels
    if wrong := not_finite(made.model.state_dict()):
        raise InputError(f"{name}: expected finite weights, got {named(wrong)}")
    if size is not None:
        made.config.image_size, made.config.keep_aspect = list(size), False
    made.model.eval().requires_grad_(False)
    return made


def _of_transformers(name: str) -> LabelTeacher:
    task = saved_task(name)
    task.labelling()  # raises for a task without labels
    model = task.load(name)
    known = class_labels(model)
    if sorted(known) != list(range(len(known))) or not known:
        raise InputError(f"{name}: expected classes 0..K-1 in its config.json, got {sorted(known)[:6]}")
    return LabelTeacher(name, task, model, model.config.model_type, known, _config(name), input_rule(model))


def _config(name: str) -> DataConfig:
    """How the recipe beside a teacher reads images, else its image processor."""
    find: Callable[[str], str | None] = lambda file: cached_file(  # noqa: E731
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    saved = find(RECIPE_FILE)
    if saved is not None:
        read = load_data_config(saved)
        return DataConfig(
            path="shapes",
            image_size=read.image_size,
            keep_aspect=read.keep_aspect,
            image_mean=read.image_mean,
            image_std=read.image_std,
        )
    stats, file = image_stats(name), find("preprocessor_config.json")
    settings = {} if file is None else read_json(Path(file))
    given = settings.get("size")
    size, keep = None, False
    if settings.get("do_resize", True) and isinstance(given, dict):
        if {"height", "width"} <= given.keys():
            size = [int(given["height"]), int(given["width"])]
        elif "shortest_edge" in given:
            short = int(given["shortest_edge"])
            size, keep = [short, int(given.get("longest_edge") or 4 * short)], True
    return DataConfig(
        path="shapes", image_size=size, keep_aspect=keep, image_mean=list(stats.mean), image_std=list(stats.std)
    )


def _of_torchvision(name: str, weights: str | None, names: Mapping[int, str] | None) -> LabelTeacher:
    model = TorchvisionHead.load(name, weights, None if names is None else [names[key] for key in sorted(names)])
    task = next(kind for kind in TASKS.values() if kind.recognises(model.stands_for))
    config = DataConfig(path="shapes", image_mean=list(model.image_mean), image_std=list(model.image_std))
    return LabelTeacher(name, task, model, "torchvision", dict(enumerate(model.names)), config, InputRule())
