"""The `teacher:` section of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Gt, Le, Len

from cankd_hf.config.advice import Say
from cankd_hf.config.data import Mean, Std
from cankd_hf.config.schema import Section
from cankd_hf.names import TORCHVISION


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
        revision: branch, tag or commit on the Hub; for `torchvision/NAME` the name of its weights, such as `COCO_V1`.
        weights: for `torchvision/NAME`: a local `.safetensors` or `.pth` file instead of torchvision's own weights.
        trust_remote_code: whether code from the model's repository may run.
        compile: whether `torch.compile` is used.
        image_mean: mean of its input normalisation; by default that of its image processor.
        image_std: standard deviation of its input normalisation; by default that of its image processor.
        class_map: for losses on its logits: the student's names of classes that it calls otherwise,
            `{teacher's name: student's name}`; classes of equal names are put in the student's order by themselves.
        fit: settings of `training` with which a run first trains the teacher on the task; only used in recipes.
    """

    place: ClassVar[str] = "teacher"
    one_of: ClassVar[tuple[str, ...]] = ("model", "config")

    model: str | None = None
    config: dict[str, Any] | None = None
    taps: str | Annotated[list[str], Len(1), Say(fix="name at least one, or write auto")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    scale: Annotated[float, Gt(0), Le(16)] = 1.0
    revision: str | None = None
    weights: str | None = None
    trust_remote_code: bool = False
    compile: bool = False
    image_mean: Mean | None = None
    image_std: Std | None = None
    class_map: dict[str, str] | None = None
    fit: dict[str, Any] | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges."""
        if self.weights is not None and not self.from_torchvision:
            yield "weights", f"expected `model: torchvision/NAME` beside it, got {self.model!r}; leave it out"
        if self.fit is not None and self.from_torchvision:
            yield "fit", "a torchvision net cannot be trained here; leave fit out"

    check = Section.raise_problems

    @property
    def from_torchvision(self) -> bool:
        """Whether `model` is a model of torchvision."""
        return str(self.model).startswith(TORCHVISION)
