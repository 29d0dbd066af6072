"""What a run chooses by its device where the recipe leaves it open, and the line that tells it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers.utils import is_torch_tf32_available

from cankd_hf.config.recipe import Recipe
from cankd_hf.host import cpu_bf16
from cankd_hf.teachers.teacher import auto_dtype

_SHARDED = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}  # setting -> launcher's variable


@dataclass(frozen=True)
class Device:
    """Where a run computes.

    Attributes:
        kind: `cpu`, `cuda`, `mps`, ..., as in `torch.device.type`.
        sharded: whether FSDP or DeepSpeed divides the weights.
        tf32: whether it multiplies matrices in TF32.
    """

    kind: str
    sharded: bool = False
    tf32: bool = False


def device_of(settings: Mapping[str, Any]) -> Device:
    """The device that the Trainer takes with these settings of `training`."""
    # With the last, `accelerate launch --cpu` says the same.
    on_cpu = settings.get("use_cpu") or parse_flag_from_env("ACCELERATE_USE_CPU")
    found = None if on_cpu else torch.accelerator.current_accelerator()
    there = found is not None and torch.accelerator.is_available()
    sharded = any(settings.get(key) or os.environ.get(name) == "true" for key, name in _SHARDED.items())
    kind = found.type if found is not None and there else "cpu"
    return Device(kind, sharded, kind == "cuda" and is_torch_tf32_available())


def choices(device: Device, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `training` that suit a device, without those that are set: these are never changed.

    - Loading processes live as long as the run: to start them takes seconds in every epoch.
    - Memory is pinned, and copies from it are not waited for, on CUDA; other devices copy in another way.
    - Channels-last: convolutions are faster on CUDA, and on the CPU (docs/performance.md), where it is chosen for bf16
      only: in float32 a run has the numbers of the stock Trainer. MPS copies such tensors, and weights that are
      divided among processes must be contiguous.
    - AdamW is fused on every device: one pass over the weights.
    - TF32 is for what stays in float32 under bf16 or fp16, which are coarser. Elsewhere it stays off: it would change
      results more than all of these.

    Args:
        device: where the run computes.
        settings: what the recipe sets.
    """
    cuda, given = device.kind == "cuda", settings.get("accelerator_config")
    fast_last = cuda or (device.kind == "cpu" and bool(settings.get("bf16")))
    chosen: dict[str, Any] = {
        **({"dataloader_persistent_workers": True} if settings.get("dataloader_num_workers") else {}),
        "dataloader_pin_memory": cuda,
        "channels_last": fast_last and not device.sharded,
        "optim": "adamw_torch_fused",
        **({"tf32": True} if device.tf32 and (settings.get("bf16") or settings.get("fp16")) else {}),
    }
    made = {name: value for name, value in chosen.items() if settings.get(name) is None}
    open_copies = given is None or (isinstance(given, Mapping) and "non_blocking" not in given)
    if cuda and settings.get("dataloader_pin_memory") in (None, True) and open_copies:
        made["accelerator_config"] = {**(given or {}), "non_blocking": True}
    return made


def told(device: Device, recipe: Recipe) -> str:
    """What was chosen for the device and what the recipe sets instead; a second line where bf16 is slow there."""
    made = choices(device, recipe.training)
    if made.pop("accelerator_config", None):
        made["accelerator_config.non_blocking"] = True
    chosen = [f"{name}={_shown(value)}" for name, value in made.items()]
    chosen += [
        f"{recipe.teacher_path(name)}.dtype={str(auto_dtype(device.kind)).removeprefix('torch.')}"
        for name, config in recipe.named_teachers().items()
        if config.dtype == "auto"
    ]
    names = choices(device, {"bf16": True, "dataloader_num_workers": 1})
    given = {name: recipe.training.get(name) for name in names}
    kept = [f"{name}={_shown(value)}" for name, value in given.items() if value is not None]
    stays = f"; the recipe sets {', '.join(kept)}" if kept else ""
    slow = _without_bf16(recipe) if device.kind == "cpu" and not cpu_bf16() else []
    hint = f"\nbf16: this CPU has no instructions for it, and computes faster without; set {', '.join(slow)}"
    return f"device: {device.kind} (chosen: {', '.join(chosen)}{stays})" + (hint if slow else "")


def _without_bf16(recipe: Recipe) -> list[str]:
    """What sets each part of a run that would compute in bf16 to float32."""
    found = ["training.bf16=false"] if recipe.training.get("bf16") else []
    if not found and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        found = ["--mixed_precision no of accelerate launch"]
    teachers = {recipe.teacher_path(name): config for name, config in recipe.named_teachers().items()}
    return found + [f"{path}.dtype=float32" for path, config in teachers.items() if config.dtype == "bfloat16"]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
