"""Strong augmentation of the student's picture; the teacher sees the sample without it.

Kinds and strengths as in UniMatch V2 (2410.10777) for masks, UBTv2 and Dense Teacher for boxes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from PIL import ImageFilter
from torchvision.transforms import v2

from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.data.common.batch import DRAWN, TEACHER_VIEW
from cankd_hf.data.common.dataset import Transform
from cankd_hf.data.common.mixing import Drawn, Shape
from cankd_hf.data.common.seeds import for_the_student
from cankd_hf.data.common.transforms import ImageTransform
from cankd_hf.errors import InputError

SIGMAS = (0.1, 2.0)  # standard deviations of the blur, in pixels


class Blur(v2.Transform):
    """Pillow's Gaussian blur, as in UniMatch; half the time of torchvision's, which is of one size of kernel."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"radius": SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * torch.rand(()).item()}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return inpt.filter(ImageFilter.GaussianBlur(params["radius"]))


class Strong:
    """Gives an item of a transform a picture for the student alone: colours, blur, and what is drawn for its batch.

    Geometry is not touched: both pictures show the same places.
    """

    def __init__(self, config: StrongConfig) -> None:
        self.config = config
        self.set_strength(1.0 if config.strength is None else config.strength)

    def set_strength(self, strength: float) -> None:
        """Multiplies the strength of the colours, and how often pictures are grey or blurred."""
        self.strength, config = strength, self.config
        steps: list[v2.Transform] = []
        if any(config.jitter) and config.jitter_p and strength:
            brightness, contrast, saturation, hue = (strength * value for value in config.jitter)
            colours = v2.ColorJitter(brightness, contrast, saturation, min(hue, 0.5))
            steps.append(v2.RandomApply([colours], p=config.jitter_p))
        if config.grey and strength:
            steps.append(v2.RandomGrayscale(min(1.0, strength * config.grey)))
        if config.blur and strength:
            steps.append(v2.RandomApply([Blur()], p=min(1.0, strength * config.blur)))
        # On Pillow's pictures the change of hue and the blur take half the time that they take on tensors.
        self.colours = v2.Compose([v2.ToPILImage(), *steps, v2.PILToTensor()]) if steps else None

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The item with `pixel_values` uint8 [3, h, w] for the student, the teacher's beside them."""
        weak = item["pixel_values"]
        with for_the_student():
            picture = weak if self.colours is None else self.colours(weak).contiguous()
            drawn = self._drawn()
        return {**item, "pixel_values": picture, TEACHER_VIEW: weak, DRAWN: drawn}

    def _drawn(self) -> Drawn:
        """What is cut and erased; as many random numbers whatever the settings."""
        config = self.config
        chances = torch.rand(1 + len(config.erase)).tolist()
        cut = _shape(config.cutmix_area, config.cutmix_aspect)
        erased = [_shape(config.erase_area, config.erase_aspect) for _ in config.erase]
        return Drawn(
            cut if chances[0] < config.cutmix else None,
            tuple(shape for shape, chance, p in zip(erased, chances[1:], config.erase, strict=True) if chance < p),
        )


def _shape(areas: list[float], aspects: list[float]) -> Shape:
    """A rectangle of uniform area and aspect ratio."""
    area, aspect, top, left = torch.rand(4).tolist()
    return Shape(areas[0] + area * (areas[1] - areas[0]), aspects[0] + aspect * (aspects[1] - aspects[0]), top, left)


def strongly(augment: Transform, config: DataConfig) -> Transform:
    """A training transform with strong augmentation of the student's picture."""
    if not isinstance(augment, ImageTransform):
        raise InputError(
            "data.strong.images: expected none for a task with a transform of its own, whose pictures cannot be told "
            "apart; derive it from ImageTransform"
        )
    made = copy.copy(augment)
    made.strong = Strong(config.strong)
    return made
