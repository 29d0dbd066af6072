"""Teacher outputs for pictures that are mixed for the student alone (CutMix, 1905.04899)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.teachers.teacher import TeacherOutput


def mix_outputs(
    outputs: Mapping[str, TeacherOutput], mix: Tensor | None, size: Sequence[int]
) -> dict[str, TeacherOutput]:
    """Pastes rectangles of the outputs for one image into those for another, as it was done with the pictures.

    The teacher sees pictures as they are, so that its outputs can be stored; the student's are mixed.

    Args:
        outputs: of each teacher, for the pictures before they were mixed.
        mix: `meta["mix"]` [B, 5] of the batch, see `Batch`; None: nothing was mixed.
        size: height and width of the pictures.

    Raises:
        InputError: for logits without a place in the picture, such as those of a whole image.
    """
    if mix is None:
        return dict(outputs)
    return {name: _mixed(name, output, mix, (int(size[0]), int(size[1]))) for name, output in outputs.items()}


def _mixed(name: str, output: TeacherOutput, mix: Tensor, size: tuple[int, int]) -> TeacherOutput:
    if output.dense is not None or (output.logits is not None and output.logits.ndim != 4):
        raise InputError(
            f"data.strong.cutmix: expected maps or logits [B, K, H, W] of the teacher {name}, whose logits have no "
            "place in the picture; set it to 0"
        )
    logits = None if output.logits is None else mix_map(output.logits, mix, size)
    return replace(output, maps=[mix_map(one, mix, size) for one in output.maps], logits=logits)


def mix_map(values: Tensor, mix: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [B, C, h, w] of pictures of this `size`, with the cells of each rectangle taken from the partner.

    Made without asking the device for the rectangles. Cells are cut exactly where the rectangles are multiples of
    their stride, else those whose centre lies inside.
    """
    mix = mix.to(values.device)
    rows, columns = (_inside(mix[:, [1 + axis, 3 + axis]], values.shape[2 + axis], size[axis]) for axis in (0, 1))
    inside = (rows[:, :, None] & columns[:, None, :] & (mix[:, :1, None] >= 0))[:, None]
    return torch.where(inside, values[mix[:, 0].clamp(min=0)], values)


def _inside(bounds: Tensor, cells: int, length: int) -> Tensor:
    """Whether the centre of each cell of a side lies within `bounds` [B, 2]: [B, cells]."""
    centres = (torch.arange(cells, device=bounds.device) + 0.5) * stride_of(cells, length)
    return (centres >= bounds[:, :1]) & (centres < bounds[:, 1:])


def stride_of(cells: int, length: int) -> float:
    """Pixels between the cells of a map: of a convolutional network a power of two, whose last cell may lie on the
    edge of the picture (360 pixels, 12 cells: 32); else the picture's length by their number."""
    power = 1
    while -(-length // power) > cells:
        power *= 2
    return power if -(-length // power) == cells else length / cells
