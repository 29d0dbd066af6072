"""The `training:` section of a recipe: names, types, ranges and contradictions of its settings.

They are those of `TrainingArguments` and `CanKDConfig`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from numbers import Real
from typing import Any

from cankd_hf.config.advice import not_one_of
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
_WIDER: dict[str, Any] = {
    "ema": bool | float | str | None,  # YAML reads `off` as false
    "fsdp": bool | str | list[str] | None,
    "debug": str | list[str],
}

# The range of every number in `training:`, in words and as a test; settings that are null are not tested.
_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "a number of at least 0",
        lambda value: value >= 0,
        "learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps eval_delay neftune_noise_alpha",
    ),
    (
        "a whole number of at least 1",
        lambda value: value >= 1,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
        "torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb save_total_limit max_nonfinite_steps "
        "conditioning_batches",
    ),
    (
        "a number of at least 0 and below 1",
        lambda value: 0 <= value < 1,
        "adam_beta1 adam_beta2 label_smoothing_factor",
    ),
    ("a number > 0", lambda value: value > 0, "num_train_epochs backbone_lr_scale"),
    ("a whole number of at least 0, or -1 (then num_train_epochs counts)", lambda value: value >= -1, "max_steps"),
    (
        "a whole number of steps of at least 1, or a fraction of the run between 0 and 1",
        lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
        "logging_steps save_steps eval_steps",
    ),
    ("a whole number of images, or 0 for never", lambda value: value >= 0, "check_images prediction_images"),
    ("a number of steps, or 0 for never", lambda value: value >= 0, "log_figures_steps"),
    ("a whole number from 0 to 1024", lambda value: 0 <= value <= 1024, "dataloader_num_workers"),
    ("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32, "seed data_seed"),
    ("a number of seconds from 1 to 100000000", lambda value: 1 <= value <= 10**8, "ddp_timeout"),
]
RANGES = {name: (words, test) for words, test, names in _RANGES for name in names.split()}


_LEVELS = ("debug", "info", "warning", "error", "critical", "passive", "detail")
# Texts of which only some have a meaning; others fail late, or are ignored by transformers.
_CHOICES = {
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
}


def out_of_range(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Numbers outside of their range, and unknown names: key and message of each."""
    for name, choices in _CHOICES.items():
        value = settings.get(name)
        if isinstance(value, str) and value not in choices:
            yield name, not_one_of(value, choices)
    for name, (words, fits) in RANGES.items():
        value = settings.get(name)
        if isinstance(value, Real) and not (math.isfinite(value) and fits(float(value))):
            yield name, f"expected {words}, got {value}"


def contradictions(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings that need others, as `TrainingArguments` and the Trainer ask for them: key and message of each."""
    evaluated, saved = settings.get("eval_strategy", "no"), settings.get("save_strategy", "steps")
    every = settings.get("eval_steps") or settings.get("logging_steps", 500)
    if settings.get("load_best_model_at_end") and saved != "best":
        if evaluated != saved:
            fix = "give both the same value" if evaluated != "no" else "set training.eval_strategy to the same"
            yield (
                "load_best_model_at_end",
                f"needs scores of every checkpoint, but eval_strategy is {evaluated!r} and save_strategy is "
                f"{saved!r}; {fix}, or save_strategy to best",
            )
        elif evaluated == "steps" and not _multiple(settings.get("save_steps", 500), every):
            yield (
                "load_best_model_at_end",
                f"needs scores of every checkpoint, but save_steps is {settings.get('save_steps', 500)} and "
                f"eval_steps {every}; make save_steps a multiple of eval_steps",
            )
    if evaluated == "no":
        if saved == "best":
            yield "save_strategy", "best needs scores; set training.eval_strategy to steps or epoch"
        if settings.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
            yield "lr_scheduler_type", "follows a score; set training.eval_strategy to steps or epoch, or take another"
    if saved == "best" and settings.get("metric_for_best_model") is None:
        yield "save_strategy", "best needs to know by which score; set training.metric_for_best_model"
    for half in ("", "_full_eval"):
        if settings.get(f"fp16{half}") and settings.get(f"bf16{half}"):
            yield f"fp16{half}", f"expected one of fp16{half} and bf16{half}, got both; keep one"
    if not settings.get("dataloader_num_workers"):
        workers = ("prefetch_factor", "persistent_workers", "multiprocessing_context")
        for name in (f"dataloader_{setting}" for setting in workers):
            if settings.get(name):
                yield name, "has a meaning for loading processes only; set training.dataloader_num_workers"


def _multiple(steps: float, unit: float) -> bool:
    """Whether both are numbers of steps, or both fractions of the run, and the first is a multiple of the second."""
    return (steps < 1) == (unit < 1) and round(steps / unit, 6).is_integer() if unit > 0 else True


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
    # The few settings of CanKDConfig itself are checked by `own_problems`, with the classes of models and losses.
    upstream = fields("transformers.training_args", "TrainingArguments").keys()
    numbers = {key: value for key, value in read.items() if key in upstream and problems.usable(f"{path}.{key}")}
    for key, message in out_of_range(numbers):
        fix = "" if ";" in message else "; see docs/recipes.md"
        problems.say(f"{path}.{key}", message + fix, unread=True)
    # `logging_steps` is annotated as a float; a whole number in the recipe stays an int.
    return {
        key: given[key] if isinstance(given[key], int) and isinstance(value, float) else value
        for key, value in read.items()
    }
