"""The `data:` section of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from cankd_hf.config.advice import Say, nearest, show
from cankd_hf.config.schema import Section
from cankd_hf.errors import InputError

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
PILLOW_LIMIT = 89_478_485  # above this number of pixels Pillow warns of a decompression bomb
GENERATED = {"train": 512, "validation": 64, "test": 128, "unlabelled": 512, "size": 96, "seed": 0}
_GENERATED_RANGES = {"size": (16, 4096), "seed": (0, 2**32 - 1)}  # of the others: 1 to 10**6

Count = Annotated[int, Ge(1)]
Size = Annotated[list[Annotated[int, Ge(4)]], Len(2, 2), Say("[height, width]")]
Range = Annotated[list[Annotated[float, Ge(0.05), Le(16)]], Len(2, 2), Say("[smallest, largest], both above 0")]
Chance = Annotated[float, Ge(0), Le(1)]
Part = Annotated[list[Annotated[float, Gt(0), Le(1)]], Len(2, 2), Say("[smallest, largest], from above 0 to 1")]
Mean = Annotated[list[Annotated[float, Ge(-10), Le(10)]], Len(3, 3), Say("three numbers (red, green, blue)")]
Std = Annotated[list[Annotated[float, Ge(0.001), Le(10)]], Len(3, 3), Say("three numbers above 0 (red, green, blue)")]


# What is left open in `data.strong`, for masks.
STRONG: Mapping[str, Any] = {"jitter": [0.5, 0.5, 0.5, 0.25], "cutmix": 0.5, "erase": []}


def labelled_in(batch: int, ratio: float) -> int:
    """How many images of a batch are labelled, with `ratio` unlabelled ones for each.

    Raises:
        InputError: if the batch cannot be shared out in this ratio.
    """
    if count := _share(batch, ratio):
        return count
    possible = (size for size in range(2, 4 * batch + 130) if _share(size, ratio))
    near = sorted(possible, key=lambda size: abs(size - batch))
    fits = " or ".join(str(size) for size in sorted(near[:2]))
    fix = f"set training.per_device_train_batch_size to {fits}" if fits else "take a ratio of small whole numbers"
    raise InputError(
        f"data.unlabelled_ratio: expected a batch that can be shared out, 1 labelled image to {ratio:g} unlabelled "
        f"ones, got {batch} for each process; {fix}"
    )


def _share(batch: int, ratio: float) -> int:
    """The labelled images of a batch; 0 if they are no whole number."""
    count = round(batch / (1 + ratio))
    return count if 0 < count < batch and abs(batch - count * (1 + ratio)) < 0.01 else 0


def check_mixed(name: str, images: int) -> None:
    """Raises InputError for a part of a batch that is too small for pictures to be mixed within it."""
    if images < 2:
        raise InputError(
            f"data.strong.cutmix: expected at least 2 {name} images in a batch of one process, which are mixed with "
            f"each other, got {images}; enlarge training.per_device_train_batch_size, or set it to 0"
        )


@dataclass
class StrongConfig(Section):
    """The `data.strong:` section: augmentation of the student's picture alone, by default that of UniMatch V2, and for
    boxes that of UBTv2 and Dense Teacher.

    The teacher sees the picture before it; its maps and logits are mixed as the student's pictures are, and nothing is
    learned where one is erased.

    Attributes:
        images: which images: `unlabelled`, `all` or `none`.
        strength: multiplies `jitter`, `grey` and `blur`; null: 1, and 0.5 for students of less than 2 million
            parameters.
        jitter: strength of the random change of brightness, contrast, saturation and hue; null: [0.5, 0.5, 0.5, 0.25],
            with boxes [0.4, 0.4, 0.4, 0.1].
        jitter_p: how often colours are changed.
        grey: how often a picture becomes grey.
        blur: how often it is blurred.
        cutmix: how often a rectangle of the next picture of the batch is pasted in (CutMix), with the teacher's answer
            there; null: 0.5, with boxes 0.
        cutmix_area: [smallest, largest] part of the picture that it takes.
        cutmix_aspect: [smallest, largest] height by width.
        erase: how often a rectangle is erased, a number for each rectangle; null: none, with boxes [0.7, 0.5, 0.3].
        erase_area: [smallest, largest] part of the picture that each takes.
        erase_aspect: [smallest, largest] height by width.
    """

    place: ClassVar[str] = "data.strong"

    images: Literal["unlabelled", "all", "none"] = "unlabelled"
    strength: Annotated[float, Ge(0), Le(2)] | None = None
    jitter: (
        Annotated[list[Annotated[float, Ge(0), Lt(1)]], Len(4, 4), Say("four numbers from 0 to below 1")] | None
    ) = None
    jitter_p: Chance = 0.8
    grey: Chance = 0.2
    blur: Chance = 0.5
    cutmix: Chance | None = None
    cutmix_area: Part = field(default_factory=lambda: [0.02, 0.4])
    cutmix_aspect: Range = field(default_factory=lambda: [0.3, 3.3])
    erase: Annotated[list[Chance], Len(0, 8), Say("a list of numbers from 0 to 1")] | None = None
    erase_area: Part = field(default_factory=lambda: [0.02, 0.2])
    erase_aspect: Range = field(default_factory=lambda: [0.3, 3.3])

    def filled(self, usual: Mapping[str, Any] = STRONG) -> StrongConfig:
        """The same with what is left open filled in."""
        return replace(self, **{key: value for key, value in usual.items() if getattr(self, key) is None})

    def problems(self) -> Iterator[tuple[str, str]]:
        """Ranges whose ends are the wrong way round."""
        for key in ("cutmix_area", "cutmix_aspect", "erase_area", "erase_aspect"):
            least, most = getattr(self, key)
            if least > most:
                yield key, f"expected [smallest, largest], got {[least, most]}; write {[most, least]}"


@dataclass
class DepthConfig(Section):
    """The `data.depth:` section: what the numbers of depth maps mean, and what a student of depth learns from them.

    Attributes:
        column: column, or key of `metadata.jsonl` (`X` or `X_file_name`), with the depth map; `auto` looks for the
            usual names, such as `depth_file_name`, then for the only other image.
        kind: `metric`: the student predicts metres; `relative`: inverse depth up to scale and shift, as MiDaS and
            Depth Anything, for data of several cameras and units.
        scale: what the numbers are divided by to be metres: 1000 for millimetres (NYU), 256 for KITTI; null: 1000 for
            whole numbers of 16 bits and more, 1 for floating point numbers.
        min: metres; what is nearer counts as unknown, as do 0, NaN and infinity.
        max: metres; what is farther counts as unknown, and no metric student predicts more; null: no limit.
        loss: `silog` or `log_l1` for metric depth, `ssi` or `ssi_mad` for relative depth; null: the first.
    """

    place: ClassVar[str] = "data.depth"

    column: str = "auto"
    kind: Literal["metric", "relative"] = "metric"
    scale: Annotated[float, Gt(0), Le(1e9)] | None = None
    min: Annotated[float, Gt(0), Le(1e6)] = 0.001
    max: Annotated[float, Gt(0), Le(1e6)] | None = None
    loss: Literal["silog", "log_l1", "ssi", "ssi_mad"] | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """A loss of the other kind, and limits the wrong way round."""
        if self.loss is not None and self.loss.startswith("ssi") != (self.kind == "relative"):
            other = "ssi or ssi_mad" if self.kind == "relative" else "silog or log_l1"
            yield "loss", f"expected {other} for {self.kind} depth, got {self.loss}"
        if self.max is not None and self.max <= self.min:
            yield "max", f"expected more than data.depth.min = {self.min:g}, got {self.max:g}"


@dataclass
class DataConfig(Section):
    """The `data:` section of a recipe.

    Attributes:
        path: a local folder, in which what it holds is found (docs/data.md), a parquet file / glob / folder, a Hub
            data set id, or `shapes` (the generated set).
        name: configuration name, for a Hub data set with several configurations.
        revision: branch, tag or commit of a Hub data set.
        train_split: split to train on; `val`, `valid`, `dev` and `validation` mean the same, as do `test`/`testing`.
            `train[:90%]`, `train[100:]` or `train[::8]` (each eighth image) is a part of it; `train[:90%@7]` and
            `train[90%:@7]` are two parts of it after a shuffle by the seed 7; `train[::8][:90%]` is a part of a part;
            `train[:62]+train[163:]` are two parts together, and `train[::8]-train[:62]` is one without another.
        eval_split: split scored during training; null: none (label-free runs then hold out a part of train). A set
            without a `validation` holds out a part of train too.
        test_split: split of the final table; null: none. Without a `test` in the set, the validation split is scored.
        image_column: column with the image; `auto` looks for `image`, then for the only image column.
        mask_column: column with the mask; `auto` looks for the usual names, then for the other image column.
        objects_column: detection and instance segmentation: column, or key of `metadata.jsonl`, with the boxes,
            classes and masks of an image; `auto` is `objects`.
        annotations: COCO json files, with `{split}` for the name of the split, such as
            `annotations/instances_{split}.json`, relative to `path`, for boxes or masks drawn from outlines; `auto`
            looks for them in a folder without a metadata file. Images are in `{split}/`, `images/{split}/`, `images/`,
            the folder itself, or found by their names anywhere in it.
        box_format: detection: `xywh` ([x, y, width, height]) or `xyxy` (two corners), in pixels.
        labels: json file with the class names: either `{"0": "sky", ...}` or an object with `id2label` and optionally
            `palette`, `ignore_index`, `reduce_labels`, `values` (number in a mask -> class) and `by_colour`. Default:
            `labels.json` in the data folder, else the names that the data has. For a Hub data set it may be a file of
            the repository. The ids are those after `reduce_labels`; those of boxes may have gaps.
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
        holdout: fraction of the training images held out for a validation split that the set lacks, and the same for
            a test split that the recipe names.
        generated: sizes of the generated set: train, validation, test, unlabelled, size (pixels), seed.
        unlabelled: images without labels, from which the student learns by its teacher alone: a folder, parquet file
            or Hub data set, `shapes` (generated), or `rows`: the images of `train_split` without a mask or boxes.
            Without a teacher they are not used. See docs/unlabelled.md.
        unlabelled_split: the split of that set, or a part of it; `auto`: `unlabelled` or `unlabeled` where it has one,
            else `train`.
        unlabelled_streaming: read it while training (needs `training.max_steps`), as `streaming` does for both.
        unlabelled_ratio: unlabelled images for each labelled one in every batch, which they must divide.
        strong: augmentation of the student's picture alone.
        depth: depth: what the numbers of depth maps mean.
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
    unlabelled: str | None = None
    unlabelled_split: str = "auto"
    unlabelled_streaming: bool = False
    unlabelled_ratio: Annotated[float, Gt(0), Le(64)] = 1.0
    strong: StrongConfig = field(default_factory=StrongConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)

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
