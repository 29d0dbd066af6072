"""Teachers: any vision model, frozen, fed what it was trained on, and run no further than needed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.features.auto_taps import quiet_forward
from cankd_hf.features.grids import resize_map
from cankd_hf.features.inputs import (
    FIXED_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PATCHED,
    ImageStats,
    image_stats,
    input_rule,
    is_timm_name,
    timm_stages,
    timm_stats,
)
from cankd_hf.features.taps import Level, Taps
from cankd_hf.features.truncate import compile_around, drop_unread_stages
from cankd_hf.models.prompts import give_no_words

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STAGE = re.compile(r"stem|stage\d+")
TIMM_STAGES = [f"stage{index}" for index in range(100)]  # timm counts its maps from 0


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
        if self.weights is not None and not self._torchvision:
            problems.append(f"teacher.weights: expected `model: torchvision/NAME` beside it, got {self.model!r}")
        if self.fit is not None and self._torchvision:
            problems.append("teacher.fit: a torchvision net cannot be trained here; leave fit out")
        if problems:
            raise InputError(problems)

    @property
    def _torchvision(self) -> bool:
        return str(self.model).startswith("torchvision/")

    def _which(self) -> str:
        return "neither" if self.model is None else "both"


class Teacher(nn.Module):
    """A frozen model that gives feature maps of the student's images.

    In eval for good, without gradients, in its own dtype. Images come as the student sees them; they are brought to
    the teacher's own normalisation and size first, and the forward ends at its last tap. It must not become a
    submodule of anything trained or saved.

    Args:
        model: any vision model; frozen, cast and given hooks in place.
        config: taps, dtype, scale, compile; `model` and `config` of it are ignored.
        stats: the normalisation the model expects.
        name: what to call it in the manifest.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(
        self, model: nn.Module, config: TeacherConfig | None = None, stats: ImageStats | None = None, name: str = ""
    ) -> None:
        super().__init__()
        self.config = config or TeacherConfig()
        self.name = name or type(model).__name__
        self.model = model.requires_grad_(False).eval()
        give_no_words(model)
        self.stats = self._own_stats(stats or ImageStats())
        self.rule = input_rule(model)
        self.fingerprint = _fingerprint(model)
        self.taps = Taps(model, self.config.taps, stop_early=True)
        self.register_buffer("input_scale", torch.ones(1, 3, 1, 1), persistent=False)
        self.register_buffer("input_shift", torch.zeros(1, 3, 1, 1), persistent=False)
        self.set_input_stats(IMAGENET_MEAN, IMAGENET_STD)
        self.train(False)
        self._settle_dtype()
        if self.config.compile:
            compile_around(self.model, self.taps.modules)

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Gives the maps of a batch.

        Args:
            pixel_values: `[B, 3, H, W]`, normalised with the student's statistics.

        Returns:
            Maps `[B, C, h, w]` in the teacher's dtype, fine to coarse, without gradient.
        """
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        # Under the trainer's autocast the teacher would run half in another dtype than its own.
        with torch.no_grad(), torch.autocast(pixel_values.device.type, enabled=False):
            images = pixel_values.float()
            if self._renormalise:
                images = images * self.input_scale + self.input_shift
            images = resize_map(images, self.rule.size(size, self.config.scale))
            return self.taps.run(images.to(self.dtype), **self.taps.forward_kwargs)

    def levels(self, image_size: tuple[int, int]) -> list[Level]:
        """Measures the maps for the student's image size.

        Args:
            image_size: height and width of the images given to `forward`.

        Returns:
            Levels in the order of `forward`; strides count pixels of those images, not of the resized ones.
        """
        seen = self.rule.size(image_size, self.config.scale)
        enlarged = sqrt(seen[0] * seen[1] / (image_size[0] * image_size[1]))
        return [replace(level, stride=level.stride / enlarged) for level in self.taps.levels(seen)]

    def set_input_stats(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Says how the images given to `forward` are normalised.

        Args:
            mean: of red, green, blue, for pixels in 0..1.
            std: likewise.
        """
        own_mean, own_std = (torch.tensor(list(values)) for values in (self.stats.mean, self.stats.std))
        scale = torch.tensor(list(std)) / own_std
        shift = (torch.tensor(list(mean)) - own_mean) / own_std
        self.input_scale.copy_(scale.view(1, 3, 1, 1))
        self.input_shift.copy_(shift.view(1, 3, 1, 1))
        self._renormalise = bool((scale != 1).any() or (shift != 0).any())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in."""
        if self.config.dtype != "auto":
            return DTYPES[self.config.dtype]
        return torch.bfloat16 if self.input_scale.device.type == "cuda" else torch.float32

    def num_parameters(self) -> int:
        """Number of parameters held (blocks after the last map are not)."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def manifest(self) -> dict[str, Any]:
        """What a card or a log should say about this teacher, as plain data."""
        return {
            "model": self.name,
            "revision": self.config.revision,
            "class": type(self.model).__name__,
            "taps": self._tap_names(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": self.num_parameters(),
            "fingerprint": self.fingerprint,
            "image_mean": list(self.stats.mean),
            "image_std": list(self.stats.std),
            "image_stats_from": self.stats.source,
            "input_multiple": self.rule.multiple,
            "input_size": list(self.rule.fixed) if self.rule.fixed else None,
            "scale": self.config.scale,
        }

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval, whatever is asked: a teacher with dropout or moving BatchNorm statistics is no teacher."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Teacher:
        """Stays frozen, whatever is asked."""
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)
        self._settle_dtype()
        return self

    def _settle_dtype(self) -> None:
        """Puts the model in its dtype, which for "auto" depends on the device; pixel arithmetic stays exact."""
        self.model.to(self.dtype)
        self.input_scale.data = self.input_scale.data.float()
        self.input_shift.data = self.input_shift.data.float()

    def _own_stats(self, found: ImageStats) -> ImageStats:
        mean, std = self.config.image_mean, self.config.image_std
        if mean is None and std is None:
            return found
        return ImageStats(tuple(mean or found.mean), tuple(std or found.std), "the recipe")

    def _tap_names(self) -> list[str]:
        from transformers.backbone_utils import BackboneMixin

        if self.taps.paths == ["."] and isinstance(self.model, BackboneMixin):
            return list(self.model.out_features)
        return list(self.taps.paths)


def load_teacher(teacher: str | Path | nn.Module | TeacherConfig, **overrides: Any) -> Teacher:
    """Loads any vision model as a teacher.

    Args:
        teacher: a local folder or Hub id (a backbone, a plain ViT, or a dense-prediction model of `transformers` or
            ours), `timm/NAME`, `torchvision/NAME`, a model in memory (frozen and cast in place), a `TeacherConfig`, or
            a `Teacher`.
        **overrides: fields of `TeacherConfig`.

    Returns:
        The teacher, on the CPU; move it with `.to(device)`.

    Raises:
        InputError: if it is not found, its weights do not fit (the missing keys are listed), or a tap does not exist.
    """
    if isinstance(teacher, Teacher):
        if overrides:
            raise InputError(
                f"teacher: expected no options beside a ready Teacher, got {', '.join(sorted(overrides))}"
            )
        return teacher
    config = teacher if isinstance(teacher, TeacherConfig) else TeacherConfig()
    unknown = sorted(set(overrides) - {field.name for field in fields(TeacherConfig)})
    if unknown:
        raise InputError([f"teacher.{name}: no such option" for name in unknown])
    config = replace(config, **overrides)
    if isinstance(teacher, nn.Module):
        replace(config, model="in memory", config=None).check()
        return Teacher(teacher, config)
    if isinstance(teacher, (str, Path)):
        config = replace(config, model=str(teacher))
    config.check()
    if config._torchvision:
        return _torchvision_teacher(config)
    model, stats = _build(config)
    if _stages(config.taps) is not None:
        config = replace(config, taps="auto")
    if config.model is not None and not is_timm_name(config.model):
        from cankd_hf.models.pretrained import hub_commit

        config = replace(config, revision=hub_commit(config.model, config.revision) or config.revision)
    return Teacher(model, config, stats, name=config.model or "random weights")


def _torchvision_teacher(config: TeacherConfig) -> Teacher:
    from cankd_hf.models.torchvision_teachers import load_torchvision

    model, weights = load_torchvision(config.model or "", config.weights, config.revision)
    taps = model.taps if config.taps == "auto" else config.taps
    stats = ImageStats(model.image_mean, model.image_std, "torchvision")
    return Teacher(model, replace(config, taps=taps, revision=weights), stats, name=config.model or "")


def _build(config: TeacherConfig) -> tuple[nn.Module, ImageStats]:
    """The model with just the stages wanted, and the statistics of its images."""
    from cankd_hf.models import register
    from cankd_hf.models.backbones import load_backbone, load_config
    from cankd_hf.models.configs import config_from_dict
    from cankd_hf.models.pretrained import dense_or_plain_class, load_dense_or_plain

    register()  # our own students may be teachers
    stages = _stages(config.taps)
    name = config.model or ""
    hub: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if is_timm_name(name):
        name = "timm/" + name.removeprefix("timm/")
        found = _stage_indices(stages, TIMM_STAGES) or timm_stages(name.removeprefix("timm/"))
        return load_backbone(name, out_indices=found), image_stats(name)
    hf_config = load_config(name, hub) if name else config_from_dict(config.config or {}, "teacher.config")
    stats = image_stats(name, config.revision) if name else ImageStats()
    auto_class = dense_or_plain_class(hf_config)
    if auto_class is not None:
        return load_dense_or_plain(config.model, hf_config, auto_class, **hub), stats
    source = name or dict(config.config or {})
    timm = hf_config.model_type == "timm_backbone"
    indices = _stage_indices(stages, TIMM_STAGES if timm else hf_config.stage_names)
    model = load_backbone(source, out_indices=indices or _pyramid_stages(hf_config), **hub)
    if timm:
        stats = timm_stats(hf_config.backbone)
    size = input_rule(model).size((64, 64))
    drop_unread_stages(model, lambda: list(quiet_forward(model, size).feature_maps))
    return model, stats


def _stages(taps: str | list[str]) -> list[str] | None:
    """The taps, if all of them are stages of a backbone ("stage6", "stem")."""
    named = [taps] if isinstance(taps, str) else list(taps)
    return named if all(_STAGE.fullmatch(tap) for tap in named) else None


def _stage_indices(stages: list[str] | None, names: list[str]) -> list[int] | None:
    """Positions of the named stages among a backbone's own."""
    unknown = [stage for stage in stages or () if stage not in names]
    if unknown:
        raise InputError(f"teacher.taps: expected stages among {', '.join(names)}, got {', '.join(unknown)}")
    return None if stages is None else sorted(names.index(stage) for stage in stages)


def _pyramid_stages(config: Any) -> list[int] | None:
    """All stages of a pyramid backbone that asks for its last alone; None leaves the choice as it is."""
    one_stride = config.model_type in PATCHED or config.model_type in FIXED_SIZE - {"hiera"}
    if one_stride or len(config.out_indices) > 1:
        return None
    if config.model_type == "timm_backbone":
        return timm_stages(config.backbone)
    return [index for index, stage in enumerate(config.stage_names) if stage != "stem"]


def _fingerprint(model: nn.Module, tensors: int = 8) -> str:
    """sha256 over names and values of a few parameters, evenly spread: tells two teachers apart in a log."""
    named = list(model.named_parameters())
    digest = hashlib.sha256()
    for index in sorted({round(i * (len(named) - 1) / (tensors - 1)) for i in range(tensors)}) if named else ():
        name, parameter = named[index]
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
