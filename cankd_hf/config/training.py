"""The `training:` section of a recipe: the settings of `TrainingArguments` and `CanKDConfig`, by name and type."""

from functools import cache
from typing import Any

from cankd_hf.config.declared import fields
from cankd_hf.config.schema import Problems
from cankd_hf.tokens import NO_TOKEN

# Settings that are elsewhere in a recipe, or were removed from transformers.
_MOVED = {
    "hub_token": NO_TOKEN,
    "output_dir": "belongs to the top level of the recipe; write `output_dir:` there",
    "seed": "belongs to the top level of the recipe; write `seed:` there",
    "warmup_ratio": "is gone from transformers 5; write warmup_steps, where a number below 1 is a fraction of the run",
    "evaluation_strategy": "is gone from transformers 5; write eval_strategy",
    "overwrite_output_dir": "is gone from transformers 5; name another output_dir or remove the folder",
    "logging_dir": "is gone from transformers 5; set the environment variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "is gone from transformers 5; every checkpoint is safetensors",
    "no_cuda": "is gone from transformers 5; write use_cpu: true",
}
# Settings that accept more types than their annotation says.
_WIDER: dict[str, Any] = {"fsdp": bool | str | list[str] | None, "debug": str | list[str]}


@cache
def training_fields() -> dict[str, Any]:
    """Name and type of every setting that `training:` accepts."""
    hints = fields("transformers.training_args", "TrainingArguments")
    hints = {**hints, **fields("cankd_hf.training.arguments", "CanKDConfig")}
    return {name: _WIDER.get(name, kind) for name, kind in hints.items() if name not in _MOVED}


def read_training(problems: Problems, training: dict[str, Any], path: str) -> dict[str, Any]:
    """Settings of `CanKDConfig` with their names and types checked."""
    for key in [key for key in training if key in _MOVED]:
        problems.say(f"{path}.{key}", _MOVED[key])
    given = {key: value for key, value in training.items() if key not in _MOVED}
    read = problems.keywords(training_fields(), given, path)
    # `logging_steps` is annotated as a float; a whole number in the recipe stays an int.
    return {
        key: given[key] if isinstance(given[key], int) and isinstance(value, float) else value
        for key, value in read.items()
    }
