"""Taps: feature maps read from inside any model with forward hooks."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.features.auto_taps import auto_taps, quiet_forward, resolve_path, token_patch_size, trailing_tokens
from cankd_hf.features.grids import to_maps
from cankd_hf.features.inputs import input_rule


@dataclass(frozen=True)
class Level:
    """One feature map of a model, measured in a forward."""

    tap: str  # where it comes from, in the syntax of `Taps`
    channels: int  # C
    stride: float  # image pixels per cell (geometric mean of both sides)
    size: tuple[int, int]  # height and width in cells


@dataclass(frozen=True)
class _Spec:
    """One resolved tap: a module's path and, if only an item of its output is wanted, that item's key."""

    path: str
    key: str | None

    def __str__(self) -> str:
        return (self.path or ".") + (f":{self.key}" if self.key is not None else "")


class _Stop(Exception):
    """Raised by the hook of the last tap to stop a forward early."""


class Taps:
    """Forward hooks on a model that keep the outputs of some of its modules.

    Tap syntax: "module.path" is every map of that module's output, in order; "module.path:1" one of these maps,
    "module.path:KEY" the maps under that key of its output, "module.path:KEY.1" one of them; "." is the model itself
    (a backbone's feature maps). In a path `*` matches every child and `-1` the last. If a module runs several times in
    one forward, its first run counts.

    A model that pads its images has a method `map_frame(image_size)` that returns height and width of the image and of
    the area its maps cover, in one unit; the cells on the padding are left out.

    Hooks are active only during the model's own forward, so the second forward of gradient checkpointing (during
    backward) is not mistaken for a new one.

    Args:
        model: the model to hook; not changed otherwise.
        taps: "auto" (a backbone's own maps, else a table of known models, else a search) or a list of taps.
        stop_early: stop the forward in `run` as soon as every tap has been seen.

    Attributes:
        paths: the taps as given, or as "auto" found them.
        modules: names of the tapped modules ("" is the model itself).
        forward_kwargs: pass these to the model's forward so that it takes images of any size (plain ViTs need it).

    Raises:
        InputError: if a tap does not exist in the model, or "auto" finds nothing.
    """

    def __init__(self, model: nn.Module, taps: str | Sequence[str] = "auto", stop_early: bool = False) -> None:
        self.model = model
        self.paths = self._taps(model, taps)
        self._specs = [
            _Spec(path, key if colon else None)
            for module, colon, key in (tap.partition(":") for tap in self.paths)
            for path in resolve_path(model, module)
        ]
        parameters = inspect.signature(type(model).forward).parameters
        interpolates = "interpolate_pos_encoding" in parameters
        self.forward_kwargs: dict[str, Any] = {"interpolate_pos_encoding": True} if interpolates else {}
        self._patch_size = token_patch_size(model)
        self._trailing = trailing_tokens(model)
        self.modules = {spec.path for spec in self._specs}
        self._stop_early = stop_early and "" not in self.modules
        self._stopping = False
        self._listening = False
        self._grad = False
        self._outputs: dict[str, Any] = {}
        self._handles = [model.register_forward_pre_hook(self._begin)]
        for path in sorted(self.modules - {""}):
            self._handles.append(model.get_submodule(path).register_forward_hook(partial(self._keep, path)))
        self._handles.append(model.register_forward_hook(self._end))

    @staticmethod
    def _taps(model: nn.Module, taps: str | Sequence[str]) -> list[str]:
        if isinstance(taps, str):
            return auto_taps(model) if taps == "auto" else [taps]
        if not taps:
            raise InputError("taps: expected 'auto' or at least one module path, got an empty list; fix: 'auto'")
        return list(taps)

    def collect(self, image_size: tuple[int, int]) -> list[Tensor]:
        """Returns the maps `[B, C, H, W]` of the model's last forward, on images of `image_size`, and clears them.

        They are ordered fine to coarse; maps of equal size keep the order of the taps. Raises RuntimeError if no
        forward ran since the last call, or a tapped module did not run in it; InputError if a tap's output contains no
        feature map.
        """
        return [feature_map for _, feature_map, _ in self._collect(image_size)]

    def run(self, pixel_values: Tensor, **kwargs: Any) -> list[Tensor]:
        """Runs the model on `[B, 3, H, W]`, with `stop_early` only as far as the last tap; returns what `collect`
        does."""
        self._run(pixel_values, **kwargs)
        return self.collect((pixel_values.shape[-2], pixel_values.shape[-1]))

    def run_to_end(self, pixel_values: Tensor, **kwargs: Any) -> tuple[list[Tensor], Any]:
        """Runs the whole model; returns its maps, as `run` does, and its output."""
        output = self.model(pixel_values, **kwargs)
        return self.collect((pixel_values.shape[-2], pixel_values.shape[-1])), output

    def levels(self, image_size: tuple[int, int], **kwargs: Any) -> list[Level]:
        """Measures the maps for an image size, one level per map in the order of `collect`, by a `quiet_forward`.

        If the model fails at this size, the nearest one that it takes is used. `kwargs` are passed to its forward.
        """
        rule = input_rule(self.model)
        image_size = rule.size(image_size) if rule.strict or rule.fixed else image_size
        quiet_forward(self.model, image_size, runner=self._run, **self.forward_kwargs, **kwargs)
        return [
            Level(tap, feature_map.shape[1], stride, (feature_map.shape[2], feature_map.shape[3]))
            for tap, feature_map, stride in self._collect(image_size)
        ]

    def clear(self) -> None:
        """Clears the maps of the last forward."""
        self._outputs.clear()

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def _run(self, pixel_values: Tensor, **kwargs: Any) -> None:
        self._stopping = self._stop_early
        try:
            self.model(pixel_values, **kwargs)
        except _Stop:
            pass  # expected: nothing after the last tap is needed
        finally:
            self._stopping = False
            self._listening = False

    def _collect(self, image_size: tuple[int, int]) -> list[tuple[str, Tensor, float]]:
        """Each map with its tap and its stride in pixels of the image."""
        found: list[tuple[str, Tensor, float]] = []
        for spec in self._specs:
            if spec.path not in self._outputs:
                raise RuntimeError(f"tap {spec} has no output: its module did not run in the last forward")
            output = self._outputs[spec.path]
            if self._trailing and isinstance(output, Tensor) and output.ndim == 3:
                output = output[:, : -self._trailing]
            maps = _maps_of(output, spec, image_size, self._patch_size)
            found += [(tap, *self._on_image(feature_map, image_size)) for tap, feature_map in maps.items()]
        self.clear()
        return sorted(found, key=lambda item: -item[1].shape[-2] * item[1].shape[-1])

    def _on_image(self, feature_map: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, float]:
        """Drops the cells on padding that the model added, so that maps of two models show the same picture."""
        frame = getattr(self.model, "map_frame", None)
        extent, covered = (image_size, image_size) if frame is None else frame(image_size)
        cells = (feature_map.shape[-2], feature_map.shape[-1])
        # Measured on the whole map: a cell that lies half on the image is as large as the others.
        shares = [part / whole for part, whole in zip(extent, covered, strict=True)]
        stride = sqrt(image_size[0] * image_size[1] / (shares[0] * shares[1] * cells[0] * cells[1]))
        rows, columns = (ceil(count * part / whole) for count, part, whole in zip(cells, extent, covered, strict=True))
        return feature_map[..., :rows, :columns], stride

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._outputs.clear()
        self._listening = True
        self._grad = torch.is_grad_enabled()

    def _keep(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._listening or path in self._outputs:
            return
        if self._grad and not torch.is_grad_enabled():
            raise InputError(
                f"taps: {path} runs without gradient inside a gradient-checkpointed block; "
                "fix: gradient_checkpointing_kwargs: {use_reentrant: false}, or tap a module outside the block"
            )
        self._outputs[path] = output
        if self._stopping and len(self._outputs) == len(self.modules):
            raise _Stop

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if "" in self.modules:
            self._outputs[""] = output
        self._listening = False


def _maps_of(output: Any, spec: _Spec, image_size: tuple[int, int], patch_size: int | None) -> dict[str, Tensor]:
    """The maps of a module's output that a tap names, each under a name that is itself a tap."""
    keys = spec.key.split(".") if spec.key is not None else []
    number = int(keys.pop()) if keys and keys[-1].lstrip("-").isdigit() else None
    for key in keys:
        if not isinstance(output, Mapping) or key not in output:
            held = ", ".join(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            raise InputError(f"taps: {spec} asks for {key!r} of an output that has only {held}")
        output = output[key]
    maps = to_maps(output, image_size, patch_size)
    if number is not None:
        if not -len(maps) <= number < len(maps):
            raise InputError(f"taps: {spec} asks for map {number} of an output of {len(maps)} maps")
        return {str(spec): maps[number]}
    dot = "." if keys else ":"
    return {f"{spec}{dot}{index}" if len(maps) > 1 else str(spec): found for index, found in enumerate(maps)}
