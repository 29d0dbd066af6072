"""What a recipe says about a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cankd_hf.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class TeacherConfig:
    """How to get a teacher.

    Attributes:
        model: local folder, Hub id, `timm/NAME`, or `torchvision/NAME`: a detector or segmentation net of torchvision,
            such as `torchvision/retinanet_resnet50_fpn_v2`, read at the outputs of its backbone and pyramid.
        config: instead of `model`: fields of a configuration with `model_type`; random weights, for tests.
        taps: "auto"; stage names of a backbone ("stage6"); or taps as in `cankd_hf.features.Taps`.
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on CPU, bfloat16 on CUDA.
        scale: how much larger than the student's its images are (before rounding to its patch multiple).
        revision: branch, tag or commit on the Hub; for `torchvision/NAME` the name of its weights, such as `COCO_V1`.
        weights: for `torchvision/NAME`: a local `.safetensors` or `.pth` file instead of torchvision's own weights.
        trust_remote_code: whether code from the model's repository may run.
        compile: whether `torch.compile` is used.
        image_mean: of its images; by default what its image processor says.
        image_std: likewise.
        fit: how to train it first; used by the recipe alone.
    """

    model: str | None = None
    config: dict[str, Any] | None = None
    taps: str | list[str] = "auto"
    dtype: str = "auto"
    scale: float = 1.0
    revision: str | None = None
    weights: str | None = None
    trust_remote_code: bool = False
    compile: bool = False
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    fit: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuses values that cannot work, all at once.

        Raises:
            InputError: one line per bad value.
        """
        problems = []
        if (self.model is None) == (self.config is None):
            problems.append("teacher: expected exactly one of model and config, got " + self._which())
        if self.dtype != "auto" and self.dtype not in DTYPES:
            problems.append(f"teacher.dtype: expected auto, {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.scale > 0:
            problems.append(f"teacher.scale: expected a number above 0, got {self.scale!r}")
        listed = isinstance(self.taps, (list, tuple)) and all(isinstance(tap, str) for tap in self.taps) and self.taps
        if not isinstance(self.taps, str) and not listed:
            problems.append(f"teacher.taps: expected 'auto' or a list of module paths, got {self.taps!r}")
        for name, value in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if value is not None and (len(value) != 3 or (name == "image_std" and min(value) <= 0)):
                problems.append(f"teacher.{name}: expected three numbers (red, green, blue), got {value!r}")
        if self.weights is not None and not self.from_torchvision:
            problems.append(f"teacher.weights: expected `model: torchvision/NAME` beside it, got {self.model!r}")
        if self.fit is not None and self.from_torchvision:
            problems.append("teacher.fit: a torchvision net cannot be trained here; leave fit out")
        if problems:
            raise InputError(problems)

    @property
    def from_torchvision(self) -> bool:
        """Whether `model` names a net of torchvision."""
        return str(self.model).startswith("torchvision/")

    def _which(self) -> str:
        return "neither" if self.model is None else "both"
