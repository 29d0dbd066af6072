"""Local files and folders that a recipe names, looked for before anything is loaded."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from cankd_hf.config.advice import show
from cankd_hf.config.named import absent, hint, is_there, settle_hub
from cankd_hf.config.recipe import Recipe
from cankd_hf.config.shipped import shipped_files
from cankd_hf.names import TORCHVISION


def missing_places(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Key and message of each place that is not there, or is not what it must be.

    A name that may be a Hub id is not looked for; where the Hub cannot be reached, its libraries work offline then.
    """
    path, labels = recipe.data.path or "", recipe.data.labels
    sections = {"data": {"path": path, "unlabelled": recipe.data.unlabelled}}
    sections |= {f"phases.{index}.data": phase.data for index, phase in enumerate(recipe.phases or ())}
    named = {f"{where}.{key}": data.get(key) for where, data in sections.items() for key in ("path", "unlabelled")}
    for key, place in {key: str(value) for key, value in named.items() if value is not None}.items():
        if place not in ("", "shapes", "rows") and (missing := absent(place)):
            rows = ", `rows`" if key.endswith("unlabelled") else ""
            expected = f"expected a folder, a parquet file, a Hub id{rows} or `shapes`"
            yield key, f"{expected}, got {show(place)}; {missing}"
        elif place not in ("", "shapes", "rows") and not is_there(place):
            settle_hub()
    there = is_there(path)
    if labels is not None and there:
        base = path if os.path.isdir(path) else os.path.dirname(path)
        if not any(os.path.lexists(file) for file in (labels, os.path.join(base, labels))):
            yield (
                "data.labels",
                f"expected a json file, here or in {path}, got {labels}, which does not exist{hint(labels)}",
            )
    models: dict[str, Any] = {}
    for place, student in recipe.named_students().items():
        models |= {f"{place}.{key}": getattr(student, key) for key in ("model", "backbone", "config")}
    for name, teacher in recipe.named_teachers().items():
        place = recipe.teacher_path(name)
        models |= {place: teacher.model, f"{place}.config": teacher.config}
        if teacher.weights is not None and not os.path.isfile(teacher.weights):
            got = f"got {show(teacher.weights)}; none is there{hint(teacher.weights)}"
            yield f"{place}.weights", f"expected a .safetensors or .pth file, {got}"
    for place, model in models.items():
        yield from _models(place, model)
    for place, student in recipe.named_students().items():
        tokenizer = student.tokenizer
        if tokenizer is not None and (missing := absent(tokenizer)):
            yield f"{place}.tokenizer", f"expected a folder or a Hub id, got {show(tokenizer)}; {missing}"


def key_of(section: Mapping[str, Any], name: str) -> list[str] | None:
    """Where a section, or what is nested in it, names a model: its keys; None if it does not."""
    for key, value in section.items():
        if isinstance(value, str) and value.removeprefix("timm/") == name.removeprefix("timm/"):
            return [key]
        if isinstance(value, Mapping) and (inner := key_of(value, name)):
            return [key, *inner]
    return None


def _not_trained(model: str) -> str | None:
    """That a recipe of the package writes the model of this name, and was not run here; None if none does."""
    made = f"\noutput_dir: {model}\n"
    recipe = next((file.stem for file in shipped_files("recipe") if made in file.read_text(encoding="utf-8")), None)
    return recipe and f"nothing is there; train it first: cankd train {recipe} data.path=..."


def _models(place: str, model: Any) -> Iterator[tuple[str, str]]:
    """A model named by a folder, and those nested in a configuration as `pretrained`."""
    if isinstance(model, dict):
        for key, inner in model.items():
            if key == "pretrained" or isinstance(inner, dict):
                yield from _models(f"{place}.{key}", inner)
        return
    if not isinstance(model, str) or model.startswith(TORCHVISION):
        return
    if model.startswith("timm/") and not os.path.lexists(model):
        settle_hub()
        return
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            yield place, f"expected a folder with a config.json, found none in {model}; name a saved model"
    elif os.path.lexists(model):
        yield place, f"expected the folder of a model or a Hub id, got the file {model}; name its folder"
    elif missing := _not_trained(model) or absent(model):
        yield place, f"expected the folder of a model or a Hub id, got {model[:300]!r}; {missing}"
    else:
        settle_hub()
