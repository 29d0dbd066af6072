"""Reads a checkpoint of OpenMMLab: its tensors, class names, and the configuration that it was trained with."""

import argparse
import ast
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cankd_hf.errors import InputError

PREFIXES = {"student": ("architecture.", "student."), "teacher": ("teacher.",)}
BLOCK = "non_local_att"  # of the authors' name for the CanKD block
MORE = (
    "it holds more than plain tensors, and no code from it is run; in the environment that wrote it run `c = "
    "torch.load(FILE, weights_only=False, map_location='cpu'); torch.save({'state_dict': c.get('state_dict') or "
    "c['model'], 'meta': {k: c.get('meta', {}).get(k) for k in ('CLASSES', 'dataset_meta', 'config', 'cfg')}}, NEW)` "
    "and convert NEW"
)


@dataclass
class Checkpoint:
    """What a file holds.

    Args:
        file: the file.
        state: tensors of the model, by OpenMMLab's names.
        left_out: names in the file of what does not belong to the model, by kind.
        classes: names of the classes, if the file has them.
        settings: `model` of the configuration in the file, or the arguments of DINO's authors; empty if there is none.
        pixels: `mean`, `std` and whether images are RGB, for values in 0..255, if the file says so.
        labels: a file with the names of the classes, given by the user.
    """

    file: Path
    state: dict[str, Tensor]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    classes: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    pixels: dict[str, Any] | None = None
    labels: str | None = None

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted path, such as `bbox_head.norm_on_bbox`; of a list the first."""
        value: Any = self.settings
        for name in path.split("."):
            value = value[0] if isinstance(value, list) and value else value
            if not isinstance(value, Mapping) or value.get(name) is None:
                return default
            value = value[name]
        return value

    def count(self, pattern: str) -> int:
        """How many of `pattern` with `{}` replaced by 0, 1, 2... are there without a gap."""
        number = 0
        while pattern.format(number) in self.state:
            number += 1
        return number

    def shape(self, name: str, place: int) -> int:
        """One side of a tensor. Raises InputError if there is no such tensor."""
        if name not in self.state or self.state[name].ndim <= place:
            raise InputError(
                f"{self.file.name}: expected a tensor {name}, found none; is it this kind of model (--as)?"
            )
        return self.state[name].shape[place]


def read_checkpoint(file: Path, part: str) -> Checkpoint:
    """Reads a file without running code from it.

    Raises:
        InputError: if it is no file, cannot be read as plain tensors, or holds no such part.
    """
    if not file.is_file():
        raise InputError(f"{file}: expected a .pth file, found none")
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # DINO's authors save their arguments; plain values
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{file}: {MORE} ({' '.join(str(error).split())[:200]})") from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    state = content.get("state_dict", content.get("model", content)) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        keys = f" with {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) else ""
        raise InputError(
            f"{file}: expected a state_dict (name -> tensor), got {type(content).__name__}{keys}; give the file that "
            "MMEngine or MMCV wrote, or {'state_dict': model.state_dict()}"
        )
    meta = content.get("meta") or {}
    made = _part(file, {name.removeprefix("module."): value for name, value in state.items()}, part)
    made.classes = _classes(meta)
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "")
    _read_settings(made, text, part)
    if isinstance(content.get("args"), argparse.Namespace):
        made.settings = vars(content["args"])
    return made


def _part(file: Path, state: dict[str, Tensor], part: str) -> Checkpoint:
    """The tensors of the student or the teacher of a distiller, or all of a model's own file."""
    prefix = next((one for one in PREFIXES[part] if any(name.startswith(one) for name in state)), None)
    distils = any(name.startswith(one) for one in (*PREFIXES["student"], "distiller.") for name in state)
    if prefix is None and (distils or part == "teacher"):
        raise InputError(f"{file}: expected the tensors of a {part} ({PREFIXES[part][0]}*), found none; change --part")
    made = Checkpoint(file, {})
    for name, value in state.items():
        if BLOCK in name:
            made.left_out.setdefault("the CanKD block", []).append(name)
        elif prefix is not None and name.startswith(prefix):
            made.state[name.removeprefix(prefix)] = value
        elif prefix is not None:
            kind = {"teacher": "the teacher", "distiller": "the distiller"}.get(name.split(".")[0], "another part")
            made.left_out.setdefault(kind, []).append(name)
        else:
            made.state[name] = value
    return made


def _classes(meta: Mapping[str, Any]) -> list[str] | None:
    inner = meta.get("dataset_meta") or {}
    for names in (meta.get("CLASSES"), inner.get("classes"), inner.get("CLASSES"), meta.get("classes")):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def _read_settings(made: Checkpoint, text: str, part: str) -> None:
    """Fills settings and pixels from the text of a configuration, which is read and not run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    values = {
        node.targets[0].id: _value(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    model = values.get("model")
    model = model if isinstance(model, dict) else {}
    for name in ("architecture", "student") if part == "student" else ("teacher",):
        model = model[name] if isinstance(model.get(name), dict) else model
    made.settings = model
    given = model.get("data_preprocessor") or values.get("data_preprocessor") or values.get("img_norm_cfg")
    if isinstance(given, dict) and given.get("mean") and given.get("std"):
        rgb = given.get("to_rgb", given.get("bgr_to_rgb", given.get("rgb_to_bgr", False) is False))
        made.pixels = {"mean": list(given["mean"]), "std": list(given["std"]), "rgb": bool(rgb)}


def _value(node: ast.AST) -> Any:
    """A literal, also with `dict(...)`; None for everything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {one.arg: _value(one.value) for one in node.keywords if one.arg is not None}
    if isinstance(node, ast.Dict):
        return {_value(key): _value(one) for key, one in zip(node.keys, node.values, strict=True) if key is not None}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(one) for one in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def class_names(made: Checkpoint, count: int) -> tuple[dict[int, str], str]:
    """Names of the classes and where they come from: a file of the user's, the checkpoint, or numbers.

    Raises:
        InputError: for a file that cannot be read, or another number of names than the head has classes.
    """
    if made.labels is None and made.classes is None:
        return {i: f"class_{i}" for i in range(count)}, "numbered, as the file names none (--labels FILE)"
    names, source = made.classes or [], made.file.name
    if made.labels is not None:
        names, source = _read_labels(Path(made.labels)), made.labels
    if len(names) != count:
        raise InputError(f"{source}: expected {count} class names, as the head has classes, got {len(names)}")
    return dict(enumerate(names)), source


def _read_labels(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        values = json.loads(text)
        values = values.get("id2label", values) if isinstance(values, dict) else values
        names = values if isinstance(values, list) else [values[key] for key in sorted(values, key=int)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"--labels {file}: expected class names, json or a name a line: {error}") from error
    return [str(name) for name in names]
