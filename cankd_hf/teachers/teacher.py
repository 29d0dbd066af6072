"""Teachers: any vision model, frozen, with its own input normalisation, run only up to its last tap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.features.auto_taps import quiet_forward
from cankd_hf.features.dense import by_image, dense_of, dense_shape, queries_of, queries_shape
from cankd_hf.features.grids import logits_of, resize_map
from cankd_hf.features.inputs import IMAGENET_MEAN, IMAGENET_STD, ImageStats, input_rule
from cankd_hf.features.taps import Level, Taps
from cankd_hf.features.truncate import compile_around
from cankd_hf.models.prompts import attach_empty_prompt
from cankd_hf.teachers.classes import class_order

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def auto_dtype(kind: str) -> torch.dtype:
    """The dtype of a teacher by the type of its device: bfloat16 on CUDA where it is native, else float32."""
    native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


@dataclass(frozen=True, eq=False)
class TeacherOutput(Sequence[Tensor]):
    """Feature maps and logits of a teacher. As a sequence it holds the maps.

    Attributes:
        maps: `[B, C, H, W]` each, fine to coarse, in the teacher's dtype, without gradient.
        logits: `[B, K, H, W]`, `[B, N, K]` or `[B, K]`; None if no term reads them: the forward pass then stops at
            the last map.
        dense: a detector's predictions at all anchors, see `FPNObjectDetectionOutput`, without their centres; None if
            no term reads them.
        queries: of a DETR-like detector `class_logits` `[B, N, K]` and `boxes` `[B, N, 4]` (centre x, centre y, width,
            height in 0..1); None if no term reads them.

    Classes are in the student's order, see `Teacher.read`.
    """

    maps: list[Tensor]
    logits: Tensor | None = None
    dense: Mapping[str, Tensor] | None = None
    queries: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: Any) -> Any:
        return self.maps[index]

    def to(self, device: torch.device) -> TeacherOutput:
        """The same on a device."""
        held = [*self.maps, *([] if self.logits is None else [self.logits])]
        held += [value for of in (self.dense, self.queries) for value in (of or {}).values()]
        if all(value.device == device for value in held):
            return self
        logits = None if self.logits is None else self.logits.to(device, non_blocking=True)
        dense, queries = (
            None if of is None else {name: value.to(device, non_blocking=True) for name, value in of.items()}
            for of in (self.dense, self.queries)
        )
        return TeacherOutput([x.to(device, non_blocking=True) for x in self.maps], logits, dense, queries)


def in_order(output: TeacherOutput, order: Sequence[int]) -> TeacherOutput:
    """The output with its classes in another order; a last one that is none ("no object") stays the last."""

    def sorted_classes(logits: Tensor, dim: int) -> Tensor:
        rest = range(len(order), logits.shape[dim])
        index = torch.tensor([*order, *rest]).to(logits.device, non_blocking=True)
        return logits.index_select(dim, index)

    logits = output.logits
    if logits is not None:
        logits = sorted_classes(logits, 2 if logits.ndim == 3 else 1)
    dense, queries = (
        None if of is None else {**of, "class_logits": sorted_classes(of["class_logits"], 2)}
        for of in (output.dense, output.queries)
    )
    return TeacherOutput(output.maps, logits, dense, queries)


class Teacher(nn.Module):
    """A frozen model that returns feature maps of the student's images, and its logits if `reads_logits` is set.

    Always in eval mode, without gradients, in its own dtype. Images are normalised as for the student; `forward`
    converts them to the teacher's normalisation and size. The forward pass stops at the last tap, or with
    `reads_logits` after the head. It must not become a submodule of a module that is trained or saved.

    Args:
        model: any vision model; frozen, cast and hooked in place.
        config: taps, dtype, scale, compile; its `model` and `config` are ignored.
        stats: the input normalisation of the model.
        name: the model's name in the manifest.
        seed: of its random weights, for the manifest; None for other weights.
    """

    input_scale: Tensor
    input_shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        config: TeacherConfig | None = None,
        stats: ImageStats | None = None,
        name: str = "",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config or TeacherConfig()
        self.name = name or type(model).__name__
        self.seed = seed
        self.model = model.requires_grad_(False).eval()
        attach_empty_prompt(model)
        self.stats = self._own_stats(stats or ImageStats())
        self.rule = input_rule(model)
        self.reads_logits = self.reads_dense = self.reads_queries = False
        self.class_order: list[int] | None = None
        self.destination: str | None = None  # kind of device where it computes, if it rests elsewhere until then
        self.fingerprint = _fingerprint(model)
        self.taps = Taps(model, self.config.taps, stop_early=True)
        self.register_buffer("input_scale", torch.ones(1, 3, 1, 1), persistent=False)
        self.register_buffer("input_shift", torch.zeros(1, 3, 1, 1), persistent=False)
        self.set_input_stats(IMAGENET_MEAN, IMAGENET_STD)
        self.train(False)
        self._settle_dtype()
        if self.config.compile:
            compile_around(self.model, self.taps.modules)

    def forward(self, pixel_values: Tensor) -> TeacherOutput:
        """Returns the maps of a batch, and with `reads_logits` its logits.

        Args:
            pixel_values: `[B, 3, H, W]`, normalised with the student's statistics.

        Returns:
            Maps `[B, C, h, w]` and logits in the teacher's dtype, maps fine to coarse, without gradient.
        """
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        # Without this, the trainer's autocast would change the dtype of parts of the teacher.
        with torch.no_grad(), torch.autocast(pixel_values.device.type, enabled=False):
            images = pixel_values.float()
            if self._renormalise:
                images = images * self.input_scale + self.input_shift
            images = resize_map(images, self.rule.size(size, self.config.scale))
            images, inputs = images.to(self.dtype), self.taps.forward_kwargs
            if not (self.reads_logits or self.reads_dense or self.reads_queries):
                return TeacherOutput(self.taps.run(images, **inputs))
            if self.reads_dense:
                inputs = {**inputs, "output_dense": True}
            maps, output = self.taps.run_to_end(images, **inputs)
            queries = queries_of(output, self.model, training=False) if self.reads_queries else None
            found = TeacherOutput(maps, logits_of(output), by_image(dense_of(output)), queries)
            return found if self.class_order is None else in_order(found, self.class_order)

    def read(self, what: Collection[str], names: Mapping[int, str]) -> None:
        """Sets what `forward` returns beside the maps, and brings the classes into a student's order.

        Args:
            what: `logits`, `dense`, `queries`; others are ignored.
            names: of the student's classes.

        Raises:
            InputError: if the classes of the two have other names, see `class_order`.
        """
        self.reads_logits, self.reads_dense, self.reads_queries = (
            kind in what for kind in ("logits", "dense", "queries")
        )
        if self.reads_logits or self.reads_dense or self.reads_queries:
            own = getattr(getattr(self.model, "config", None), "id2label", None) or {}
            self.class_order = class_order(own, names, self.config.class_map, self.name)

    def seen_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that images of the student are given to the model in."""
        return self.rule.size(image_size, self.config.scale)

    def without_logits(self) -> str:
        """Why a teacher has no logits, in a few words; empty where there is nothing to say."""
        kinds = getattr(getattr(self.model, "config", None), "architectures", None) or [""]
        if not kinds[0].endswith("ForImageClassification"):
            return ""
        return f"{kinds[0]} is loaded as a backbone, without its classes of whole images"

    def levels(self, image_size: tuple[int, int]) -> list[Level]:
        """Measures strides and channels of the maps.

        Args:
            image_size: height and width of the images given to `forward`.

        Returns:
            Levels in the order of `forward`; strides count pixels of those images, not of the resized ones.
        """
        seen = self.rule.size(image_size, self.config.scale)
        enlarged = sqrt(seen[0] * seen[1] / (image_size[0] * image_size[1]))
        return [replace(level, stride=level.stride / enlarged) for level in self.taps.levels(seen)]

    def logits_shape(self, image_size: tuple[int, int]) -> torch.Size | None:
        """The shape of the logits for one image of this size; None for a model without logits."""
        seen = self.rule.size(image_size, self.config.scale)
        found = logits_of(quiet_forward(self.model, seen, **self.taps.forward_kwargs))
        return None if found is None else found.shape

    def queries_shape(self, image_size: tuple[int, int]) -> torch.Size | None:
        """The shape [1, N, K] of the class logits of the queries for an image of this size; None for other models."""
        return queries_shape(self.model, self.seen_size(image_size), **self.taps.forward_kwargs)

    def dense_shape(self, image_size: tuple[int, int]) -> torch.Size | None:
        """The shape [1, A, K] of the dense class logits for an image of this size; None for other models."""
        seen = self.rule.size(image_size, self.config.scale)
        return dense_shape(self.model, seen, **self.taps.forward_kwargs)

    def set_input_stats(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the normalisation of the images passed to `forward`.

        Args:
            mean: of red, green, blue, for pixels in 0..1.
            std: standard deviation of red, green, blue.
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
        if self.config.offload and torch.accelerator.is_available():  # it rests elsewhere than where it computes
            return self.dtype_on(str(torch.accelerator.current_accelerator()))
        return self.dtype_on(self.device.type)

    def dtype_on(self, kind: str) -> torch.dtype:
        """The dtype it computes in on a kind of device."""
        return auto_dtype(kind) if self.config.dtype == "auto" else DTYPES[self.config.dtype]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.input_scale.device

    def num_parameters(self) -> int:
        """Number of parameters, without blocks after the last tap that were removed."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def manifest(self) -> dict[str, Any]:
        """Description of this teacher for model cards and logs, as plain data.

        Its dtype is that where it computes: for a stored teacher it does not change when it is first asked.
        """
        dtype = self.dtype if self.destination is None else self.dtype_on(self.destination)
        return {
            "model": self.name,
            "revision": self.config.revision,
            "class": type(self.model).__name__,
            "taps": self.tap_names(),
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": self.num_parameters(),
            "fingerprint": self.fingerprint,
            **({} if self.seed is None else {"seed": self.seed}),
            "image_mean": list(self.stats.mean),
            "image_std": list(self.stats.std),
            "image_stats_from": self.stats.source,
            "input_multiple": self.rule.multiple,
            "input_size": list(self.rule.fixed) if self.rule.fixed else None,
            "scale": self.config.scale,
            **({} if self.config.every == 1 else {"every": self.config.every}),
            **({} if self.class_order is None else {"class_order": self.class_order}),
        }

    def train(self, mode: bool = True) -> Teacher:
        """Keeps eval mode whatever `mode` is, so that there is no dropout and BatchNorm statistics do not change."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Teacher:
        """Keeps the parameters frozen whatever `requires_grad` is."""
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._settle_dtype()
        return self

    def _settle_dtype(self) -> None:
        """Casts the model to its dtype, which for "auto" depends on the device; image scaling stays in float32."""
        self.model.to(self.dtype)
        self.input_scale.data = self.input_scale.data.float()
        self.input_shift.data = self.input_shift.data.float()

    def _own_stats(self, found: ImageStats) -> ImageStats:
        mean, std = self.config.image_mean, self.config.image_std
        if mean is None and std is None:
            return found
        return ImageStats(tuple(mean or found.mean), tuple(std or found.std), "the recipe")

    def tap_names(self) -> list[str]:
        """The taps, or the stages of a backbone."""
        from transformers.backbone_utils import BackboneMixin

        if self.taps.paths == ["."] and isinstance(self.model, BackboneMixin):
            return list(self.model.out_features)
        return list(self.taps.paths)


def _fingerprint(model: nn.Module, tensors: int = 8) -> str:
    """sha256 over names and values of a few evenly spaced parameters, to identify a teacher in logs."""
    named = list(model.named_parameters())
    digest = hashlib.sha256()
    for index in sorted({round(i * (len(named) - 1) / (tensors - 1)) for i in range(tensors)}) if named else ():
        name, parameter = named[index]
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
