"""The `teacher:` section of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len

from cankd_hf.config.advice import Say
from cankd_hf.config.data import Mean, Std
from cankd_hf.config.schema import Section
from cankd_hf.names import TORCHVISION


@dataclass
class CacheConfig(Section):
    """Stored answers of a teacher, see docs/cache.md.

    Attributes:
        views: views (crops, flips, colours) of each image: after so many epochs the pictures repeat, and the teacher
            is no longer run. What `data.strong` does to the student's pictures does not repeat.
        whole: in place of views: the teacher sees each image once as a whole, and once mirrored, at scale 1 and in
            its own colours; what it says of a crop is cut out of that, so that pictures never repeat. For maps and
            logits of pixels.
        codec: `exact`: bit for bit; `fp16`; `int8`: logits in bytes (where only softmax losses read them), the rest as
            `fp16`; `pca`: maps as bytes of their 256 principal components too.
        folder: where the answers are; one folder serves many teachers, runs and arms.
        seed: of the views; null: that of the run. With a number, runs with several seeds share the answers: they see
            the same pictures, in an order of their own.
        repo: a data set on the Hub with the content of such a folder, from which the answers of this teacher are
            downloaded first.
    """

    place: ClassVar[str] = "teacher.cache"

    views: Annotated[int, Ge(1), Le(100_000)] | None = None
    whole: bool = False
    codec: Literal["exact", "fp16", "int8", "pca"] = "fp16"
    folder: str = "runs/teacher_cache"
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] | None = None
    repo: str | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges."""
        if self.whole and self.views is not None:
            yield (
                "views",
                f"expected none with whole: true, whose pictures do not repeat, got {self.views}; leave it out",
            )
        if self.whole and self.seed is not None:
            yield "seed", f"counts for views only, got {self.seed} with whole: true; leave it out"
        if not self.whole and self.views is None:
            yield "views", "expected a number of views, such as 16, or whole: true in its place, got none"
        if not self.folder.strip() or "://" in self.folder:
            yield "folder", f"expected a local folder, got {self.folder!r}; name a data set of the Hub in repo"


@dataclass
class AdaptConfig(Section):
    """A bare backbone as a teacher of the task: a pyramid and a head on it are trained first, on the recipe's data.

    Attributes:
        fpn: neck and head on it, as `student.fpn`; a plain ViT needs `{neck: simple_pyramid}`.
        tune: what is trained beside neck and head: `head`: nothing, the backbone is frozen; `lora`: low-rank adapters
            in its attention (needs `peft`), which are merged into its weights afterwards; `all`: the whole backbone
            (`training: {backbone_lr_scale: 0.1}` moves it slower).
        rank: of the adapters.
        alpha: their scale is alpha / rank; null: 2 rank.
        targets: last names of the linear layers that get adapters, such as [q_proj, v_proj]; null: all in attention.
        training: settings of `training` for this, as in `teacher.fit`.
    """

    place: ClassVar[str] = "teacher.adapt"

    fpn: dict[str, Any] = field(default_factory=dict)
    tune: Literal["head", "lora", "all"] = "head"
    rank: Annotated[int, Ge(1), Le(1024)] = 8
    alpha: Annotated[float, Gt(0)] | None = None
    targets: Annotated[list[str], Len(1)] | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Settings of adapters where there are none, and an average of weights that are merged afterwards."""
        if self.tune == "lora" and self.training.get("ema") is not None:
            yield "training", "expected no ema with tune: lora, whose adapters are merged after training; leave it out"
        for key, default in (("rank", 8), ("alpha", None), ("targets", None)):
            if self.tune != "lora" and getattr(self, key) != default:
                yield key, f"counts for tune: lora only, got tune: {self.tune}; leave it out"


@dataclass
class TeacherConfig(Section):
    """A teacher: how it is loaded and run.

    Attributes:
        model: local folder, Hub id, `timm/NAME`, or `torchvision/NAME`: a detector or segmentation net of torchvision,
            such as `torchvision/retinanet_resnet50_fpn_v2`, read at the outputs of its backbone and pyramid.
        config: instead of `model`: fields of a configuration with `model_type`; random weights by the
            recipe's seed, for `fit` and tests.
        taps: "auto"; stage names of a backbone ("stage6"); or taps as in `cankd_hf.features.Taps`.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on CUDA devices that compute in it, else float32.
        scale: size of its images relative to the student's (before rounding to its patch multiple).
        every: n: ask the teacher in each n-th optimizer step only, from the first on. Its terms have their weight, not
            n times as much, in these steps, and are left out of the others.
        revision: branch, tag or commit on the Hub; for `torchvision/NAME` the name of its weights, such as `COCO_V1`.
        weights: for `torchvision/NAME`: a local `.safetensors` or `.pth` file instead of torchvision's own weights.
        trust_remote_code: whether code from the model's repository may run.
        compile: whether `torch.compile` is used.
        device: where it computes, if elsewhere than the student: `cpu`, or in a run of one process another
            accelerator, such as `cuda:1`; its outputs are copied to the student's.
        offload: whether its weights rest in main memory and are on the device only while it computes: teachers that
            do not fit side by side take turns, at the price of a copy in each step.
        image_mean: mean of its input normalisation; by default that of its image processor.
        image_std: standard deviation of its input normalisation; by default that of its image processor.
        class_map: for losses on its logits: the student's names of classes that it calls otherwise,
            `{teacher's name: student's name}`; classes of equal names are put in the student's order by themselves.
        fit: settings of `training` with which a run first trains the teacher on the task; only used in recipes.
        adapt: the model is a bare backbone: a neck and a head are put on it and trained first (`fit` is then
            `adapt.training`). The raw one is one override away: `teacher.adapt=null`.
        cache: stores its answers, so that it is run once for each picture.
    """

    place: ClassVar[str] = "teacher"
    one_of: ClassVar[tuple[str, ...]] = ("model", "config")

    model: str | None = None
    config: dict[str, Any] | None = None
    taps: str | Annotated[list[str], Len(1), Say(fix="name at least one, or write auto")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    scale: Annotated[float, Gt(0), Le(16)] = 1.0
    every: Annotated[int, Ge(1), Say(fix="1 asks it in every step")] = 1
    revision: str | None = None
    weights: str | None = None
    trust_remote_code: bool = False
    compile: bool = False
    device: str | None = None
    offload: bool = False
    image_mean: Mean | None = None
    image_std: Std | None = None
    class_map: dict[str, str] | None = None
    fit: dict[str, Any] | None = None
    adapt: AdaptConfig | None = None
    cache: CacheConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapt is not None and self.fit is None:
            self.fit = dict(self.adapt.training)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges."""
        if self.weights is not None and not self.from_torchvision:
            yield "weights", f"expected `model: torchvision/NAME` beside it, got {self.model!r}; leave it out"
        if self.device is not None and not re.fullmatch(r"cpu|(cuda|xpu|mps|npu)(:\d+)?", self.device):
            yield "device", f"expected cpu or an accelerator such as cuda:1, got {self.device!r}"
        elif self.device is not None and self.offload:
            yield "offload", f"its weights lie on {self.device}; leave one of the two out"
        if self.adapt is not None and self.fit != self.adapt.training:
            yield "fit", "expected the settings of adapt.training, or none beside adapt; write them there"
        if self.fit is not None and self.from_torchvision:
            yield "fit", "a torchvision net cannot be trained here; leave fit out"

    check = Section.raise_problems

    def fitted(self, folder: str | Path) -> TeacherConfig:
        """The teacher as it is read after its training, from the folder it was saved to."""
        return replace(self, model=str(folder), config=None, fit=None, adapt=None, revision=None)

    @property
    def from_torchvision(self) -> bool:
        """Whether `model` is a model of torchvision."""
        return str(self.model).startswith(TORCHVISION)
