"""Checkpoint folders: the student, the modules trained with it, and a manifest of the teachers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cankd_hf.errors import InputError
from cankd_hf.json_text import to_json
from cankd_hf.models.finite import named, not_finite
from cankd_hf.models.unreadable import NOT_LOADED
from cankd_hf.models.weight_files import share
from cankd_hf.names import DISTILLER_FILE, MANIFEST_FILE
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.distiller import Distiller

STUDENT = "student."  # prefix of the student's tensors in a `Distiller`


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits the state of a `Distiller` into the student's, under its own names, and that of connectors and losses."""
    student = {name.removeprefix(STUDENT): value for name, value in state.items() if name.startswith(STUDENT)}
    return student, {name: value.contiguous() for name, value in state.items() if not name.startswith(STUDENT)}


def check_finite(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Raises InputError if a tensor that would be saved is not finite."""
    bad = not_finite(state)
    if bad:
        raise InputError(f"{folder}: expected finite weights to save, got {named(bad)}; nothing was saved there")


def save_distillation(folder: Path, state: dict[str, Tensor], teachers: Mapping[str, Teacher]) -> None:
    """Writes connectors, losses and the manifest of the teachers into the folder of a student."""
    if state:
        save_file(state, folder / DISTILLER_FILE, metadata={"format": "pt"})
        share(folder / DISTILLER_FILE)
    else:  # an earlier objective may have left one
        (folder / DISTILLER_FILE).unlink(missing_ok=True)
    if teachers:
        (folder / MANIFEST_FILE).write_text(to_json(manifest_of(teachers)), encoding="utf-8")


def manifest_of(teachers: Mapping[str, Teacher]) -> dict[str, Any] | None:
    """The teachers' manifests as plain data: that of a single teacher, several by name; None without teachers."""
    manifests = {name: teacher.manifest() for name, teacher in teachers.items()}
    if len(manifests) < 2:
        return next(iter(manifests.values()), None)
    return manifests


def check_teachers(folder: Path, teachers: Mapping[str, Teacher]) -> None:
    """Checks that a run is resumed with the teachers it was started with.

    Raises:
        InputError: naming the differences.
    """
    file = folder / MANIFEST_FILE
    now = json.loads(to_json(manifest_of(teachers)))
    then = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if _unnamed(now) == _unnamed(then):
        return
    if now is None or then is None:
        raise InputError(f"{folder}: saved {'with' if then else 'without'} a teacher; resume it the same way")
    changed = [f"{key}: {then.get(key)!r} -> {now.get(key)!r}" for key in now if now.get(key) != then.get(key)]
    raise InputError(f"{folder}: saved with another teacher ({'; '.join(changed)}); resume with the same one")


def _unnamed(manifest: Any) -> Any:
    """Without the folders or names that weights came from: equal fingerprints are equal weights."""
    if not isinstance(manifest, dict):
        return manifest
    if not isinstance(manifest.get("fingerprint"), str):  # of several teachers, by their names
        return {name: _unnamed(one) for name, one in manifest.items()}
    return {key: value for key, value in manifest.items() if key != "model"}


def check_classes(folder: Path, student: PreTrainedModel) -> None:
    """Checks that the student of a checkpoint has the same classes as the one that goes on from it.

    Raises:
        InputError: naming a class that differs.
    """
    then = {
        int(key): name for key, name in (PretrainedConfig.get_config_dict(folder)[0].get("id2label") or {}).items()
    }
    now = {int(key): name for key, name in (student.config.id2label or {}).items()}
    if then and then != now:
        index = next(key for key in sorted({*then, *now}) if then.get(key) != now.get(key))
        raise InputError(
            f"{folder}: saved with other classes (class {index} was {then.get(index)!r}, is now {now.get(index)!r}); "
            "resume with the same ones, or start over: --restart, or resume_from_checkpoint=None"
        )


def load_checkpoint(distiller: Distiller, folder: Path) -> None:
    """Loads student, connectors and losses.

    Raises:
        InputError: if the checkpoint belongs to another student or to other terms.
    """
    state = {STUDENT + name: value for name, value in read_student_weights(folder, type(distiller.student)).items()}
    if (folder / DISTILLER_FILE).is_file():
        state.update(load_file(folder / DISTILLER_FILE))
    if wrong := [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise InputError(
            f"{folder}: expected finite weights, got inf or NaN in {', '.join(wrong[:5])}; use another one"
        )
    result = distiller.load_state_dict(state, strict=False)
    tied = set(distiller.student.all_tied_weights_keys or ())
    missing = [key for key in result.missing_keys if key.removeprefix(STUDENT) not in tied]
    if missing or result.unexpected_keys:
        raise InputError(
            f"{folder}: this checkpoint is of another student or other terms; "
            f"missing {missing[:5]}, unexpected {result.unexpected_keys[:5]}; "
            "resume with the recipe saved beside it"
        )


def read_student_weights(folder: Path, kind: type | None = None) -> dict[str, Tensor]:
    """All tensors of the student in a checkpoint folder, under the names that they have in the student.

    `save_pretrained` writes native models under the names of their published checkpoints, which often differ; so it
    does for subclasses of them, of which `kind` may be one.

    Raises:
        InputError: if there are no weights, or they cannot be read.
    """
    saved = _tensors(folder)
    names = PretrainedConfig.get_config_dict(folder)[0].get("architectures") or [""]
    natives = [base for base in getattr(kind, "__mro__", ()) if base.__module__.startswith("transformers.models.")]
    # A model of ours may have the common base of a family, which is no model.
    natives = [base for base in natives if not base.__name__.endswith("PreTrainedModel")]
    native: Any = getattr(transformers, names[0], natives[0] if natives else None)
    if native is None or names[0] == "TimmBackbone":  # ours, or one whose from_pretrained takes no folder
        return saved
    try:
        model, info = native.from_pretrained(folder, output_loading_info=True)
    except NOT_LOADED as error:
        raise InputError(f"{folder}: cannot be read as {names[0]}: {error}") from error
    state = {name: value for name, value in model.state_dict().items() if name not in info["missing_keys"]}
    return {**state, **{name: saved[name] for name in info["unexpected_keys"] if name in saved}}


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Contents of the weight files, sharded or not."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return load_file(folder / SAFE_WEIGHTS_NAME)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        state: dict[str, Tensor] = {}
        for shard in sorted(set(index["weight_map"].values())):
            state.update(load_file(folder / shard))
        return state
    raise InputError(f"{folder}: expected {SAFE_WEIGHTS_NAME}, found none; name a checkpoint-N folder")
