"""Teacher outputs for pictures that are mixed for the student alone (CutMix, 1905.04899)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from cankd_hf.data.detection.mixing import boxes_below, boxes_pasted
from cankd_hf.errors import InputError
from cankd_hf.teachers.teacher import TeacherOutput

NO_OBJECT = -20.0  # logit of a class that is certainly not there


def mix_outputs(
    outputs: Mapping[str, TeacherOutput], mix: Tensor | None, size: Sequence[int], softmax: Collection[str] = ()
) -> dict[str, TeacherOutput]:
    """Pastes rectangles of the outputs for one image into those for another, as it was done with the pictures.

    The teacher sees pictures as they are, so that its outputs can be stored; the student's are mixed.

    Args:
        outputs: of each teacher, for the pictures before they were mixed.
        mix: `meta["mix"]` [B, 5] of the batch, see `Batch`; None: nothing was mixed.
        size: height and width of the pictures.
        softmax: the teachers of which the last class of a query is "no object".

    Raises:
        InputError: for logits without a place in the picture, such as those of a whole image.
    """
    if mix is None:
        return dict(outputs)
    place = mix, (int(size[0]), int(size[1]))
    return {name: _mixed(name, output, *place, name in softmax) for name, output in outputs.items()}


def _mixed(name: str, output: TeacherOutput, mix: Tensor, size: tuple[int, int], softmax: bool) -> TeacherOutput:
    logits = output.logits
    if logits is not None and logits.ndim == 2:
        raise InputError(
            f"data.strong.cutmix: expected maps, boxes or logits [B, K, H, W] of the teacher {name}, whose logits "
            "have no place in the picture; set it to 0"
        )
    # the logits of queries have their place in `queries`, whose boxes say which of them stay
    return TeacherOutput(
        [mix_map(one, mix, size) for one in output.maps],
        mix_map(logits, mix, size) if logits is not None and logits.ndim == 4 else None,
        None if output.dense is None else mix_dense(output.dense, mix, size),
        None if output.queries is None else mix_queries(output.queries, mix, size, softmax),
    )


class _Places(NamedTuple):
    """What becomes of the boxes of the pictures below and of those pasted: [B, N, 4] and [B, N] each."""

    partner: Tensor  # row of the pasted picture [B]
    below: Tensor
    stays: Tensor
    pasted: Tensor
    comes: Tensor


def _places(boxes: Tensor, mix: Tensor, size: tuple[int, int]) -> _Places:
    """Of boxes [B, N, 4] (corners in 0..1); those of pictures that are not mixed stay as they are."""
    mix = mix.to(boxes.device)
    rectangle = (mix[:, [2, 1, 4, 3]] / mix.new_tensor([size[1], size[0]] * 2))[:, None].to(boxes.dtype)
    partner, mixed = mix[:, 0].clamp(min=0), mix[:, :1] >= 0
    below, stays = boxes_below(boxes, rectangle)
    pasted, comes = boxes_pasted(boxes[partner], rectangle)
    return _Places(partner, torch.where(mixed[..., None], below, boxes), stays | ~mixed, pasted, comes & mixed)


def mix_dense(dense: Mapping[str, Tensor], mix: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """A dense detector's predictions for mixed pictures: at each anchor that for the pasted picture, if its box comes
    along; else that for the picture below, if its box stays; else no object. See `boxes_below`."""
    places = _places(dense["boxes"], mix, size)
    made = {
        name: torch.where(places.comes if x.ndim == 2 else places.comes[..., None], x[places.partner], x)
        for name, x in dense.items()
    }
    made["boxes"] = torch.where(places.comes[..., None], places.pasted, places.below)
    made["class_logits"] = made["class_logits"].masked_fill(~(places.comes | places.stays)[..., None], NO_OBJECT)
    return made


def mix_queries(queries: Mapping[str, Tensor], mix: Tensor, size: tuple[int, int], softmax: bool) -> dict[str, Tensor]:
    """The queries of mixed pictures: twice as many, those of the picture below and those of the pasted one, of which
    the boxes that are not seen hold no object."""
    places = _places(box_convert(queries["boxes"], "cxcywh", "xyxy"), mix, size)
    logits = torch.cat([queries["class_logits"], queries["class_logits"][places.partner]], 1)
    empty = logits.new_full((logits.shape[-1],), NO_OBJECT)
    empty[-1] = -NO_OBJECT if softmax else NO_OBJECT
    there = torch.cat([places.stays, places.comes], 1)[..., None]
    boxes = box_convert(torch.cat([places.below, places.pasted], 1), "xyxy", "cxcywh")
    return {"class_logits": torch.where(there, logits, empty), "boxes": boxes}


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
