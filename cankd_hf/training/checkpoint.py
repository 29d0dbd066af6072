"""What lies in a checkpoint folder, and how a run stops without losing one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cankd_hf.errors import InputError

logger = logging.getLogger(__name__)

DISTILLER_FILE = "distiller.safetensors"
MANIFEST_FILE = "teacher_manifest.json"


def read_student_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the student in a checkpoint folder, under the names that they have in the student.

    `save_pretrained` writes a native model under the names of its published checkpoints, which for many are others.

    Raises:
        InputError: if there are none, or they cannot be read.
    """
    saved = _tensors(folder)
    names = PretrainedConfig.get_config_dict(folder)[0].get("architectures") or [""]
    native = getattr(transformers, names[0], None)
    if native is None or names[0] == "TimmBackbone":  # ours, or one whose from_pretrained takes no folder
        return saved
    try:
        model, info = native.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be read as {names[0]}: {error}") from error
    state = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
    return {**state, **{name: saved[name] for name in info["unexpected_keys"] if name in saved}}


def _tensors(folder: Path) -> dict[str, Tensor]:
    """What the files of weights hold, sharded or not."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return load_file(folder / SAFE_WEIGHTS_NAME)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        state: dict[str, Tensor] = {}
        for shard in sorted(set(index["weight_map"].values())):
            state.update(load_file(folder / shard))
        return state
    raise InputError(f"{folder}: expected {SAFE_WEIGHTS_NAME}, found none; name a checkpoint-N folder")
