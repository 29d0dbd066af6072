"""Joint transforms of image, boxes and masks, on uint8 tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers.image_transforms import get_size_with_aspect_ratio

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.batch import PLACE
from cankd_hf.data.common.transforms import (
    ImageTransform,
    Normalize,
    RandomScaleCrop,
    WholeImage,
    flip_and_jitter,
    place_of,
    resize_labels,
    whole,
)
from cankd_hf.data.detection.masks import boxes_of, run_length_rows
from cankd_hf.data.detection.objects import Objects

TRIES = 50  # crops that are drawn until one holds the centre of an object; a draw takes some 20 microseconds


def size_of_scale_one(own: Sequence[int], image_size: Sequence[int] | None, keep_aspect: bool) -> tuple[int, int]:
    """(height, width) at scale 1 of an image of size `own`: stretched to `image_size`; its own size without one.

    With `keep_aspect` it is fitted into `image_size`, rotated so that short side meets short side.
    """
    if image_size is None:
        return own[0], own[1]
    if not keep_aspect:
        return image_size[0], image_size[1]
    # Rounded as by the image processors of transformers.
    height, width = get_size_with_aspect_ratio((own[0], own[1]), min(image_size), max(image_size))
    return max(1, height), max(1, width)


class RandomScale(v2.Transform):
    """Resize image, boxes and masks to a random scale in (smallest, largest) times `size_of_scale_one`."""

    def __init__(self, scale: tuple[float, float], image_size: Sequence[int] | None, keep_aspect: bool) -> None:
        super().__init__()
        self.scale = scale
        self.image_size = image_size
        self.keep_aspect = keep_aspect

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        base = size_of_scale_one(flat_inputs[0].shape[-2:], self.image_size, self.keep_aspect)
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * torch.rand(()).item()
        return {"size": [max(1, round(side * factor)) for side in base]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(resize_labels(inpt, params["size"]))
        return F.resize(inpt, params["size"], antialias=True)


class RandomScaleCropBoxes(RandomScaleCrop):
    """`RandomScaleCrop` for images and boxes: draws crops until one holds the centre of an object.

    `image_size` and `keep_aspect` set the size at scale 1, as in `size_of_scale_one`.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        scale: tuple[float, float],
        image_size: Sequence[int] | None,
        keep_aspect: bool,
        fill: list[int],
    ) -> None:
        super().__init__(crop_size, scale, None, fill, 0)
        self.image_size = image_size
        self.keep_aspect = keep_aspect

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        self.base_size = size_of_scale_one(flat_inputs[0].shape[-2:], self.image_size, self.keep_aspect)
        boxes = next((value for value in flat_inputs if type(value) is tv_tensors.BoundingBoxes), None)
        params = super().make_params(flat_inputs)
        if boxes is None or not len(boxes):
            return params
        centres = box_convert(boxes.as_subclass(torch.Tensor), "xyxy", "cxcywh")[:, :2]
        for _ in range(TRIES):
            (top, height), (left, width) = params["box"]
            first, last = centres.new_tensor([left, top]), centres.new_tensor([left + width, top + height])
            if ((centres > first) & (centres < last)).all(1).any():
                break
            params = super().make_params(flat_inputs)
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn crop to an image [3, H, W], boxes [n, 4], masks [n, H, W] or the place of the image."""
        if not isinstance(inpt, tv_tensors.BoundingBoxes) or isinstance(inpt, WholeImage):
            return super().transform(inpt, params)
        (top, height), (left, width) = params["box"]
        rows, columns = params["inner"]
        up, before = params["before"]
        moved = inpt.as_subclass(torch.Tensor) - torch.tensor([left, top, left, top])
        moved = moved * torch.tensor([columns / width, rows / height] * 2) + torch.tensor([before, up, before, up])
        # clipped to the image inside the crop: the background around it holds no objects
        part = torch.tensor([before, up, before + columns, up + rows])
        moved = torch.minimum(torch.maximum(moved, part[:2].repeat(2)), part[2:].repeat(2))
        return tv_tensors.BoundingBoxes(moved, format="XYXY", canvas_size=self.crop_size)  # type: ignore[call-overload]


class DetectionTrainTransform(ImageTransform):
    """Random scale, crop, flip and colour; boxes outside the crop are dropped, and so are crowds, which are not
    learned, and objects of whose mask nothing is left. Boxes of masks that are cropped are those around what is left.

    Called with image [3, H, W] uint8 and `Objects` or None, it returns `pixel_values` float32 [3, h, w] and, with
    objects, `labels` as in `detection_labels`.
    """

    places = True

    def __init__(self, config: DataConfig) -> None:
        self.flips, self.base = config.flip > 0, (config.image_size, config.keep_aspect)
        scale, self.crops = (config.scale[0], config.scale[1]), config.crop_size is not None
        steps: list[v2.Transform] = []
        if config.crop_size is not None:
            fill = [round(255 * value) for value in config.image_mean]
            crop = (config.crop_size[0], config.crop_size[1])
            steps.append(RandomScaleCropBoxes(crop, scale, config.image_size, config.keep_aspect, fill))
        else:
            steps.append(RandomScale(scale, config.image_size, config.keep_aspect))
        self.augment = v2.Compose([*steps, *flip_and_jitter(config)])
        sanitize = v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_beside_boxes)
        self.clean = v2.Compose([v2.ClampBoundingBoxes(), sanitize])
        self.normalize = Normalize(config.image_mean, config.image_std)

    def size_of_scale_one(self, own: Sequence[int]) -> tuple[int, int]:
        return size_of_scale_one(own, *self.base)

    def unnormalized(self, image: torch.Tensor, label: Objects | None) -> dict[str, Any]:
        picture, place = tv_tensors.Image(image), [whole(image)] if self.tells_place else []
        if label is None:
            picture, *place = self.augment([picture, *place])
            return {"pixel_values": picture.as_subclass(torch.Tensor), **_told(place)}
        objects, single = label, label.iscrowd == 0
        boxes = tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
            objects.boxes[single], format="XYXY", canvas_size=image.shape[-2:]
        )
        sample = {"class_labels": objects.classes[single], "area": objects.area[single]}
        sample["iscrowd"] = objects.iscrowd[single]
        if objects.outlines is None:
            picture, boxes, *place = self.augment([picture, boxes, *place])
        else:
            masks = tv_tensors.Mask(objects.masks()[single])
            picture, boxes, masks, *place = self.augment([picture, boxes, masks, *place])
            there = masks.as_subclass(torch.Tensor).flatten(1).bool().any(1)
            sample = {key: value[there] for key, value in (sample | {"masks": masks}).items()}
            around = boxes_of(sample["masks"]) if self.crops else boxes.as_subclass(torch.Tensor)[there]
            boxes = tv_tensors.wrap(around, like=boxes)
        sample = self.clean({"boxes": boxes, **sample})
        labels = detection_labels(sample, picture.shape[-2:], image.shape[-2:], objects.image_id)
        return {"pixel_values": picture.as_subclass(torch.Tensor), "labels": labels, **_told(place)}


def _told(place: Sequence[tv_tensors.BoundingBoxes]) -> dict[str, Any]:
    """The place of the whole image for an item, if it was asked for; where there is background is not told."""
    return {PLACE: place_of(place[0]).told} if place else {}


class DetectionEvalTransform(ImageTransform):
    """Resize to `image_size` and normalise; every object is kept, crowds too."""

    def __init__(self, config: DataConfig) -> None:
        self.resize = RandomScale((1.0, 1.0), config.image_size, config.keep_aspect)
        self.normalize = Normalize(config.image_mean, config.image_std)

    def unnormalized(self, image: torch.Tensor, label: Objects | None) -> dict[str, Any]:
        size = size_of_scale_one(image.shape[-2:], self.resize.image_size, self.resize.keep_aspect)
        picture = image if size == tuple(image.shape[-2:]) else F.resize_image(image, list(size), antialias=True)
        item: dict[str, Any] = {"pixel_values": picture}
        if (objects := label) is not None:
            boxes = objects.boxes * torch.tensor([size[1] / image.shape[-1], size[0] / image.shape[-2]] * 2)
            sample = {"boxes": boxes, "class_labels": objects.classes, "area": objects.area}
            sample["iscrowd"] = objects.iscrowd
            if objects.outlines is not None:
                sample["masks"] = resize_labels(objects.masks(), size)
                sample["outlines"] = run_length_rows(objects.outlines)
            item["labels"] = detection_labels(sample, size, image.shape[-2:], objects.image_id)
        return item


def detection_labels(
    sample: dict[str, torch.Tensor], size: Sequence[int], orig_size: Sequence[int], image_id: int
) -> dict[str, torch.Tensor]:
    """Labels in the form of the detectors of `transformers`.

    Args:
        sample: `boxes` [n, 4] as x0, y0, x1, y1 in pixels of the transformed image; `class_labels`, `area`,
            `iscrowd`; where masks are read `masks` [n, h, w] of the transformed image, and for scores `outlines`
            [n, L], the run lengths of those of the data set (`run_length_rows`).
        size: (height, width) of the transformed image.
        orig_size: (height, width) in the data set.
        image_id: number of the image; below 0: it does not count in scores.

    Returns:
        `boxes` float32 [n, 4], centre x, centre y, width, height relative to the transformed image; `class_labels`
        int64 [n]; `area` float32 [n] in pixels of the data set's image, whatever the transform; `iscrowd` int64
        [n]; `image_id` [1], `size` [2] and `orig_size` [2], int64; `masks` bool [n, h, w] and `outlines` int8 [n, L]
        where the sample has them.
    """
    boxes = box_convert(sample["boxes"].as_subclass(torch.Tensor).float(), "xyxy", "cxcywh")
    further = {"masks": sample["masks"].as_subclass(torch.Tensor).bool()} if "masks" in sample else {}
    if "outlines" in sample:
        further["outlines"] = sample["outlines"]
    return {
        "class_labels": sample["class_labels"],
        "boxes": boxes / torch.tensor([size[1], size[0], size[1], size[0]]),
        "area": sample["area"],
        "iscrowd": sample["iscrowd"],
        "image_id": torch.tensor([image_id]),
        "orig_size": torch.tensor(list(orig_size)),
        "size": torch.tensor(list(size)),
        **further,
    }


def _beside_boxes(sample: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that are filtered with the boxes."""
    return tuple(sample[key] for key in ("class_labels", "area", "iscrowd", "masks") if key in sample)
