"""The `data:` section of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from cankd_hf.config.advice import Say, nearest, show
from cankd_hf.config.schema import Section

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
PILLOW_LIMIT = 89_478_485  # above this number of pixels Pillow warns of a decompression bomb
GENERATED = {"train": 512, "validation": 64, "test": 128, "size": 96, "seed": 0}
_GENERATED_RANGES = {"size": (16, 4096), "seed": (0, 2**32 - 1)}  # of the others: 1 to 10**6

Count = Annotated[int, Ge(1)]
Size = Annotated[list[Annotated[int, Ge(4)]], Len(2, 2), Say("[height, width]")]
Range = Annotated[list[Annotated[float, Ge(0.05), Le(16)]], Len(2, 2), Say("[smallest, largest], both above 0")]
Mean = Annotated[list[Annotated[float, Ge(-10), Le(10)]], Len(3, 3), Say("three numbers (red, green, blue)")]
Std = Annotated[list[Annotated[float, Ge(0.001), Le(10)]], Len(3, 3), Say("three numbers above 0 (red, green, blue)")]


@dataclass
class DataConfig(Section):
    """The `data:` section of a recipe.

    Attributes:
        path: a local folder, a parquet file / glob / folder, a Hub data set id, or `shapes` (the generated set).
        name: configuration name, for a Hub data set with several configurations.
        revision: branch, tag or commit of a Hub data set.
        train_split: split to train on; `val`, `valid`, `dev` and `validation` mean the same, as do `test`/`testing`.
            `train[:90%]`, `train[100:]` or `train[::8]` (each eighth image) is a part of it; `train[:90%@7]` and
            `train[90%:@7]` are two parts of it after a shuffle by the seed 7; `train[::8][:90%]` is a part of a part.
        eval_split: split scored during training; null: none (label-free runs then hold out a part of train).
        test_split: split of the final table; null: none.
        image_column: column with the image; `auto` looks for `image`, then for the only image column.
        mask_column: column with the mask; `auto` looks for the usual names, then for the other image column.
        objects_column: detection: column, or key of `metadata.jsonl`, with the boxes and classes of an image; `auto`
            is `objects`.
        annotations: detection: COCO json files instead of `metadata.jsonl`, with `{split}` for the name of the split,
            such as `annotations/instances_{split}.json`, relative to `path`; `auto` uses this name if a folder has no
            `metadata.jsonl`. Images are in `{split}/`, `images/{split}/`, `images/` or the folder itself.
        box_format: detection: `xywh` ([x, y, width, height]) or `xyxy` (two corners), in pixels.
        labels: json file with the class names: either `{"0": "sky", ...}` or an object with `id2label` and optionally
            `palette`, `ignore_index`, `reduce_labels`. Default: `labels.json` in the data folder. For a Hub data set
            it may be a file of the repository. The ids are those after `reduce_labels`; those of boxes may have gaps.
        num_labels: number of classes, for data without class names.
        ignore_index: label ignored in losses and scores, outside the classes; default: that of the `labels` file, else
            255.
        reduce_labels: label 0 is void and the classes begin at 1 (ADE20K): 0 becomes `ignore_index`, k becomes k - 1.
        soft_targets: segmentation: where a set holds soft masks (`cankd label --soft`), each view of a training image
            draws its labels from their probabilities; false: from the masks alone.
        image_size: [height, width] to which images are resized in evaluation, and to which `scale` is relative in
            training; null: each at its own size. Scores are always computed at the size of the mask. No image may
            be smaller than the student's deepest stride.
        crop_size: [height, width] of a training crop; default: `image_size`; with neither, whole images are padded.
            Detection has no default: without it, whole images are scaled and padded, with a `pixel_mask`.
        keep_aspect: detection: images keep their aspect ratio and are scaled to fit into `image_size` in either
            orientation ([800, 1333]: short side 800, unless the long one exceeds 1333); false: resized to exactly it.
        scale: [smallest, largest] random scale of a training image.
        flip: probability of a left-right flip.
        color_jitter: strength of the random change of brightness, contrast and saturation; 0: none.
        image_mean: mean of the student's input normalisation for each channel, for values in 0..1.
        image_std: standard deviation of the student's input normalisation for each channel.
        streaming: read the data while training instead of loading it first (needs `training.max_steps`).
        shuffle_buffer: size of the shuffle buffer of a stream, in images.
        on_error: `stop` at an image that cannot be used, or `skip` it and report it. Images without a mask (null) and
            boxes without area are always left out and counted.
        check: images to decode before training: `all`, `none` or a number for each split, spread evenly over it. Of
            the others in a folder only the files are looked for; one that turns out broken stops the run at its step.
        cache: decode each image once and keep it in a temporary folder, for all loading processes; until 1 GB of disk
            and memory is left.
        max_train_samples: use only the first samples, for trials.
        max_eval_samples: the same for the validation and test splits.
        max_pixels: images with more pixels are rejected before they are decoded.
        holdout: fraction of the training images held out if a label-free run has no validation split.
        generated: sizes of the generated set: train, validation, test, size (pixels), seed.
    """

    place: ClassVar[str] = "data"

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    eval_split: str | None = "validation"
    test_split: str | None = None
    image_column: str = "auto"
    mask_column: str = "auto"
    objects_column: str = "auto"
    annotations: str = "auto"
    box_format: Literal["xywh", "xyxy"] = "xywh"
    labels: str | None = None
    num_labels: Annotated[int, Ge(1), Le(100_000)] | None = None
    ignore_index: Annotated[int, Ge(-(2**31)), Le(2**31 - 1)] | None = None
    reduce_labels: bool = False
    soft_targets: bool = True
    image_size: Size | None = None
    crop_size: Size | None = None
    keep_aspect: bool = False
    scale: Range = field(default_factory=lambda: [0.5, 2.0])
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    color_jitter: Annotated[float, Ge(0), Lt(1)] = 0.0
    image_mean: Mean = field(default_factory=lambda: list(IMAGENET_MEAN))
    image_std: Std = field(default_factory=lambda: list(IMAGENET_STD))
    streaming: bool = False
    shuffle_buffer: Count = 256
    on_error: Literal["stop", "skip"] = "stop"
    check: Literal["all", "none"] | Annotated[int, Ge(0)] = 1000
    cache: bool = False
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None
    max_pixels: Count = PILLOW_LIMIT
    holdout: Annotated[float, Gt(0), Lt(1)] = 0.1
    generated: dict[str, Annotated[int, Ge(0)]] = field(default_factory=dict)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges."""
        if not self.path:
            yield "path", f"expected a folder, a parquet file, a Hub id or `shapes`, got {show(self.path)}; name one"
        if self.scale[0] > self.scale[1]:
            yield "scale", f"expected [smallest, largest], got {self.scale}; write {self.scale[::-1]}"
        if self.cache and self.streaming:
            yield (
                "cache",
                "expected false with data.streaming, which reads each image anew, got true; drop one of them",
            )
        for key in ("image_size", "crop_size"):
            size = getattr(self, key)
            if size is not None and size[0] * size[1] > self.max_pixels:
                yield (
                    key,
                    f"expected at most {self.max_pixels:,} pixels (data.max_pixels), got {size}; make it smaller",
                )
        for key, value in self.generated.items():
            if key not in GENERATED:
                yield f"generated.{key}", f"unknown key; {nearest(key, GENERATED)}"
                continue
            least, most = _GENERATED_RANGES.get(key, (1, 10**6))
            if not least <= value <= most:
                yield f"generated.{key}", f"expected a whole number from {least} to {most}, got {value}"

    check_values = Section.raise_problems
