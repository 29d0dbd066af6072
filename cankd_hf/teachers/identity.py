"""What the answers of a teacher depend on beside the picture: by this a store belongs to a teacher."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor

from cankd_hf.teachers.teacher import Teacher

SCHEMA = 1  # of stores


def identity(teacher: Teacher, device: torch.device, codec: str) -> dict[str, Any]:
    """All that an answer depends on beside the picture, as plain data.

    Args:
        teacher: with the student's input normalisation.
        device: where it runs, which decides the dtype of `auto`.
        codec: of the recipe.
    """
    dtype = teacher.dtype_on(device.type)
    config: Any = getattr(teacher.model, "config", None)
    settings = _plain(config.to_dict()) if hasattr(config, "to_dict") else {}
    return {
        "schema": SCHEMA,
        "weights": weights_digest(teacher, dtype),
        "class": type(teacher.model).__name__,
        "config": _digest(json.dumps(settings, sort_keys=True, default=str), "config"),
        "taps": teacher.tap_names(),
        "dtype": str(dtype).removeprefix("torch."),
        "scale": teacher.config.scale,
        "input": [teacher.rule.multiple, list(teacher.rule.fixed or ()), teacher.rule.strict],
        "normalisation": [teacher.input_scale.flatten().tolist(), teacher.input_shift.flatten().tolist()],
        "codec": codec,
        # only where there is one, so that stores of earlier versions are found
        **({} if teacher.class_order is None else {"class_order": list(teacher.class_order)}),
    }


def machine(device: torch.device) -> dict[str, str]:
    """What may change the last bits of an answer: kind of device, and libraries up to their minor version."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    versions["transformers"] = transformers.__version__
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} {name}",
        **{key: ".".join(text.split(".")[:2]) for key, text in versions.items()},
    }


def weights_digest(teacher: Teacher, dtype: torch.dtype) -> str:
    """A hash of all weights and buffers, in the dtype in which the teacher computes."""
    digest = hashlib.sha256()
    for name, value in _values(teacher):
        value = value.detach().to(dtype) if value.is_floating_point() else value.detach()
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def name_of(found: dict[str, Any]) -> str:
    """A name for a folder."""
    return _digest(json.dumps(found, sort_keys=True), "identity")[:24]


def _values(teacher: Teacher) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers with those that are not saved, by names that do not tell of compiling."""
    for values in (teacher.model.named_parameters(), teacher.model.named_buffers()):
        yield from ((name.replace("_orig_mod.", ""), value) for name, value in values)


def _plain(settings: Any) -> Any:
    """A configuration without what says where it came from."""
    if isinstance(settings, dict):
        left_out = ("transformers_version", "dtype", "torch_dtype", "architectures")
        return {k: _plain(v) for k, v in settings.items() if not str(k).startswith("_") and k not in left_out}
    return settings


def _digest(text: str, what: str) -> str:
    return hashlib.sha256(f"{what}:{text}".encode()).hexdigest()
