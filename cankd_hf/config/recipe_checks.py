"""What a recipe's free-form sections may hold, asked of those who take them: arguments, losses, models, tasks.

Everything heavy is imported in the function that needs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from cankd_hf.config.hub import NO_TOKEN
from cankd_hf.config.schema import Reader, nearest
from cankd_hf.errors import InputError

if TYPE_CHECKING:
    from cankd_hf.config.distill import LossTerm

# Settings of a run that stand elsewhere, or that people know from older releases of transformers.
_MOVED = {
    "hub_token": NO_TOKEN,
    "output_dir": "stands at the top of the recipe; write `output_dir:` there",
    "seed": "stands at the top of the recipe; write `seed:` there",
    "warmup_ratio": "is gone from transformers 5; write warmup_steps, where a number below 1 is a share of the run",
    "evaluation_strategy": "is gone from transformers 5; write eval_strategy",
    "overwrite_output_dir": "is gone from transformers 5; name another output_dir or remove the folder",
    "logging_dir": "is gone from transformers 5; set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "is gone from transformers 5; every checkpoint is safetensors",
    "no_cuda": "is gone from transformers 5; write use_cpu: true",
}
# Annotated as text or null, but taken as true or false too.
_WIDER: dict[str, Any] = {"fsdp": bool | str | list[str] | None, "debug": str | list[str]}


def training_fields() -> dict[str, Any]:
    """Name and type of every setting of `training:`, as a recipe may give it."""
    from cankd_hf.training.arguments import CanKDConfig

    hints = {
        name: kind for name, kind in get_type_hints(CanKDConfig).items() if name in CanKDConfig.__dataclass_fields__
    }
    return {name: _WIDER.get(name, kind) for name, kind in hints.items() if name not in _MOVED}


def check_training(reader: Reader, training: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Checks settings of `CanKDConfig` by name and type; returns them in their types."""
    for key in _MOVED.keys() & training.keys():
        reader.say(f"{path}.{key}", _MOVED[key])
    given = {key: value for key, value in training.items() if key not in _MOVED}
    read = reader.keywords(training_fields(), given, path) if given else {}
    # `logging_steps: 20` is annotated as a number; it stays the whole number that was written.
    return {
        key: given[key] if isinstance(given[key], int) and isinstance(value, float) else value
        for key, value in read.items()
    }


def check_term(reader: Reader, term: LossTerm, path: str) -> None:
    """Checks a loss term: its name, its numbers, and its options against the loss's constructor."""
    from cankd_hf.losses import LOSSES

    name = term.loss_name
    if name not in LOSSES:
        reader.say(f"{path}.loss", f"expected one of {', '.join(LOSSES)}, got {name!r}; {nearest(name, LOSSES)}")
        return
    try:
        term.check()
    except InputError as error:
        for problem in error.problems:
            reader.problems.append(_replaced(reader, problem, f"terms.{term.label}", path))
    loss = LOSSES[name]
    hints = _parameters(loss.__init__, leave_out={"channels"})
    found = len(reader.problems)
    options = reader.keywords(hints, term.options, f"{path}.options")
    if len(reader.problems) > found:
        return
    try:
        loss(8, **options)  # the constructor knows which values it takes
    except ValueError as error:
        reader.say(f"{path}.options", str(error))


def check_fpn(reader: Reader, fpn: Mapping[str, Any], path: str) -> None:
    """Checks settings of `FPNConfig` by name, type and value."""
    from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig

    hints = _parameters(FPNConfig.__init__, leave_out={"backbone_config", "semantic_loss_ignore_index", "kwargs"})
    found = len(reader.problems)
    # A tuple default says "sequence"; YAML has lists.
    hints = {name: list[int] | None if "Sequence" in str(kind) else kind for name, kind in hints.items()}
    given = reader.keywords(hints, dict(fpn), path)
    if len(reader.problems) > found:
        return
    try:
        FPNConfig(**given)
    except ValueError as error:
        reader.say(path, str(error))


def check_model_config(reader: Reader, config: Mapping[str, Any], path: str) -> None:
    """Checks a model written as a dictionary, and those nested in it: known `model_type`, keys and values."""
    from transformers import AutoConfig

    from cankd_hf.models.configs import config_from_dict
    from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig

    if "pretrained" in config:  # settings on top of a saved configuration, which is not here yet
        reader.read(str, config["pretrained"], f"{path}.pretrained")
        return
    AutoConfig.register(FPNConfig.model_type, FPNConfig, exist_ok=True)
    nested = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)}
    found = len(reader.problems)
    for key, value in nested.items():
        check_model_config(reader, value, f"{path}.{key}")
    if len(reader.problems) == found:
        known = {key: value for key, value in config.items() if not (key in nested and "pretrained" in value)}
        check_part(reader, lambda: config_from_dict(known, path))


def check_task(reader: Reader, task: str, path: str = "task") -> None:
    """Checks the name of the task."""
    from cankd_hf.tasks import TASKS

    if task not in TASKS:
        reader.say(path, f"expected one of {', '.join(TASKS)}, got {task!r}; {nearest(task, TASKS)}")


def check_part(reader: Reader, check: Any) -> None:
    """Runs a section's own check and notes what it raises, with file and line."""
    try:
        check()
    except InputError as error:
        for problem in error.problems:
            path, _, rest = problem.partition(": ")
            if not rest or " " in path:
                reader.problems.append(problem)
            elif path not in reader.said:
                reader.say(path, rest)


def _replaced(reader: Reader, problem: str, old: str, new: str) -> str:
    """`terms.cankd.weight: ...` -> `distill.terms.0.weight (file:line): ...`."""
    path, _, rest = problem.partition(": ")
    return f"{reader.place(path.replace(old, new, 1))}: {rest}"


def _parameters(function: Any, leave_out: set[str]) -> dict[str, Any]:
    """Name and type of a function's parameters."""
    hints = get_type_hints(function)
    names = list(inspect.signature(function).parameters)[1:]
    return {name: hints.get(name, Any) for name in names if name not in leave_out}
