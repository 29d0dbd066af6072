"""Checks of a recipe that need the classes of models, losses and training arguments."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from cankd_hf.config.parts import phase_parts
from cankd_hf.config.recipe import Recipe
from cankd_hf.config.schema import Problems
from cankd_hf.errors import InputError
from cankd_hf.losses import loss_named
from cankd_hf.models.configs import config_from_dict
from cankd_hf.models.dino.configuration_cankd_dino import DINOConfig
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.training.arguments import own_problems
from cankd_hf.training.placing import check_label

_HUGE = 1_000_000  # more than any number in a vision model's configuration


def check_models(recipe: Recipe, problems: Problems) -> None:
    """Adds every value that a model, a loss or the training arguments reject to `problems`."""
    for own in (FPNConfig, DINOConfig):
        AutoConfig.register(own.model_type, own, exist_ok=True)
    teachers = {recipe.teacher_path(name): teacher for name, teacher in recipe.named_teachers().items()}
    students = recipe.named_students()
    configs = {f"{path}.{key}": getattr(one, key) for path, one in students.items() for key in ("config", "backbone")}
    configs |= {f"{path}.config": teacher.config for path, teacher in teachers.items()}
    for path, config in configs.items():
        if isinstance(config, dict):
            _check_config(problems, config, path)
    for path, one in students.items():
        if one.fpn and _no_huge_numbers(problems, one.fpn, f"{path}.fpn"):
            attempt(problems, f"{path}.fpn", partial(FPNConfig, **one.fpn))
    _check_terms(problems, recipe, "")
    phases = [] if problems.found else phase_parts(recipe)
    for place, part in phases:
        if part.distill.terms != recipe.distill.terms:
            _check_terms(problems, part, f"{place}.")
    settings_of = [("training", recipe.training), *((f"{p}.fit", t.fit or {}) for p, t in teachers.items())]
    settings_of += [(f"{place}.training", part.training) for place, part in phases]
    for path, settings in settings_of:
        for key, message in own_problems(settings):
            problems.say(f"{path}.{key}", message)


def _check_terms(problems: Problems, recipe: Recipe, within: str) -> None:
    for index, term in enumerate(recipe.distill.terms):
        attempt(problems, f"{within}distill.terms.{index}.name", partial(check_label, term))
        loss, place = loss_named(term.loss_name), f"{within}distill.terms.{index}.options"
        if _no_huge_numbers(problems, term.options, place):
            with torch.device("meta"):  # whatever the sizes, no memory
                attempt(problems, place, partial(loss, 8, **term.options))


def _check_config(problems: Problems, config: Mapping[str, Any], path: str) -> None:
    """Checks a model written as a dictionary, and those nested in it: known `model_type`, keys and values."""
    if "pretrained" in config:  # changes to a saved configuration that is not loaded yet
        problems.read(str, config["pretrained"], f"{path}.pretrained")
        return
    nested = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)}
    found = len(problems.found)
    for key, value in nested.items():
        _check_config(problems, value, f"{path}.{key}")
    if len(problems.found) == found and _no_huge_numbers(problems, config, path):
        known = {key: value for key, value in config.items() if not (key in nested and "pretrained" in value)}
        attempt(problems, path, partial(config_from_dict, known, path))


def _no_huge_numbers(problems: Problems, values: Any, path: str) -> bool:
    """Adds numbers that no model has: configurations make lists and names of that many layers or classes."""
    found = len(problems.found)
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        inner = f"{path}.{key}"
        if isinstance(value, Mapping | list):
            _no_huge_numbers(problems, value, inner)
        elif isinstance(value, int) and abs(value) > _HUGE:
            problems.say(inner, f"expected a number of at most {_HUGE:,}, got {value}; give a real size")
    return len(problems.found) == found


def attempt(problems: Problems, path: str, build: Callable[[], Any]) -> None:
    """Builds an object and adds the errors that its class raises, whatever their kind: classes of transformers compare
    and index values without looking at their types."""
    try:
        build()
    except InputError as error:
        problems.take(error, path)
    except ValueError as error:
        problems.say(path, str(error))
    except Exception as error:
        problems.say(path, f"these values are not accepted ({type(error).__name__}: {error}); see the class's docs")
