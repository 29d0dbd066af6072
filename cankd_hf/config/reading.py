"""Reads YAML and `section.key=value` overrides into a `Recipe` and checks its structure, without importing torch.

All errors of structure (keys, types, ranges, names, references) are reported together. YAML runs no code: tags and
resolvers (`${oc.env:...}` would write secrets into saved recipes) are refused; references such as `${output_dir}` are
resolved. Relative paths in a recipe are relative to the current directory.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cankd_hf.config.advice import nearest, show
from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import DistillConfig, LossTerm
from cankd_hf.config.hub import HubConfig
from cankd_hf.config.parts import check_phases
from cankd_hf.config.phases import Phase
from cankd_hf.config.places import missing_places
from cankd_hf.config.plain_yaml import MAX_CHARACTERS, parse_yaml
from cankd_hf.config.recipe import Recipe, check_together
from cankd_hf.config.schema import Problems
from cankd_hf.config.shipped import find_shipped, shipped_files
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.config.training import read_training, training_fields
from cankd_hf.config.yaml_source import YamlSource
from cankd_hf.errors import InputError
from cankd_hf.names import RECIPE_FILE

# The sections searched for the right place of a misplaced key.
_SECTIONS = (Recipe, DistillConfig, DataConfig, StudentConfig, TeacherConfig, HubConfig, LossTerm, Phase)


def read_text(path: str | Path, kind: str = "recipe") -> str:
    """The text of a recipe: a file, or by its name one that comes with the package, see `find_shipped`.

    Args:
        path: the file, or the name.
        kind: `recipe` or `comparison`.

    Raises:
        InputError: if there is no such file (the message suggests a similar name), or it is not UTF-8 text.
    """
    path = find_shipped(path, kind)
    try:
        if not path.is_file():
            raise InputError(
                f"{kind}: expected a file, got {str(path)!r}, which is not a file; {_similar(path, kind)}"
            )
        with path.open("rb") as file:
            content = file.read(4 * MAX_CHARACTERS + 1)  # more is refused below, however large the file is
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got other bytes at {error.start}; save it as UTF-8") from None
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a NUL byte in the name
        if isinstance(error, InputError):
            raise
        raise InputError(f"{kind}: {str(path)!r} cannot be read: {error}") from None


def _similar(path: Path, kind: str) -> str:
    """What may have been meant by a name that is no file."""
    there = sorted(path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    others = [other.name for other in there if not other.name.startswith(".")]  # glob takes hidden ones too
    shipped = [file.stem for file in shipped_files(kind)]
    if (path / RECIPE_FILE).is_file():
        return f"it is a run, whose recipe is {path / RECIPE_FILE}"
    if path.name == str(path) and path.stem in shipped:
        return f"did you mean {path.stem!r}, which comes with the package?"
    if path.name == str(path) and not path.suffix and shipped:
        return f"{nearest(path.name, shipped)} (`cankd recipes` lists them), or name a YAML file"
    return nearest(path.name, others) if others else f"name a YAML file, for example {kind}s/{shipped[-1]}.yaml"


def read_saved(file: str | Path) -> dict[str, Any]:
    """The settings in a recipe that a run saved, unchecked.

    Raises:
        InputError: if the file is not YAML with sections.
    """
    content, _, problems = parse_yaml(read_text(file), str(file))
    if problems or not isinstance(content, dict):
        said = ": ".join(problems[0]) if problems else f"expected sections, got {show(content)}"
        raise InputError(f"{file}: {said}; it is not as a run saved it: restore it, or remove the file")
    return content


def read_recipe(
    text: str, overrides: Sequence[str] = (), source: str = "recipe", to_run: bool = False
) -> tuple[Recipe, Problems]:
    """Returns a recipe of valid structure, and the `Problems` to which further checks add.

    Args:
        text: YAML.
        overrides: `section.key=value` as on the command line; list items by number (`distill.terms.0.weight=5`),
            `teacher=null` for none.
        source: name of the text in messages, usually its file.
        to_run: also look for the local files and folders that it names.

    Raises:
        InputError: with every error of structure, each with its dotted path, file and line.
    """
    given = YamlSource(text, overrides, source)
    problems = Problems(given.place, _elsewhere)
    data = given.read(problems)
    students = data.get("students")
    if isinstance(students, dict) and students:  # whatever takes one student takes the first
        data = {"student": next(iter(students.values())), **data}
    recipe: Recipe | None = problems.read(Recipe, data, "")
    if recipe is not None:
        recipe = dataclasses.replace(recipe, training=read_training(problems, recipe.training, "training"))
        _check(problems, recipe)
        for key, message in missing_places(recipe) if to_run else ():
            problems.say(key, message)
    problems.raise_all()
    assert recipe is not None
    return recipe, problems


def load_data_config(path: str | Path | None, overrides: Sequence[str] = ()) -> DataConfig:
    """The `data:` section of a saved recipe, or the defaults, with `data.key=value` overrides.

    Args:
        path: a recipe, of which only this section is read; None for the defaults.
        overrides: `data.key=value`.

    Raises:
        InputError: with every problem found.
    """
    text = read_text(path) if path is not None else ""
    given = YamlSource(text, overrides, str(path) if path is not None else "command line")
    problems = Problems(given.place, _elsewhere)
    for override in overrides:
        if "=" in override and not override.startswith(("data.", "data=")):
            problems.say(override.partition("=")[0], "only data.key=value is used here; leave it out")
    config: DataConfig = problems.read(DataConfig, given.read(problems).get("data", {}), "data")
    problems.check(config, "data")
    problems.raise_all()
    return config


def _check(problems: Problems, recipe: Recipe) -> None:
    """Checks the rules within each section, then those between sections."""
    problems.check(recipe, "")
    several = {f"teachers.{name}": teacher for name, teacher in (recipe.teachers or {}).items()}
    for path, teacher in {"teacher": recipe.teacher, **several}.items():
        if teacher is not None and teacher.fit is not None:
            read_training(problems, teacher.fit, f"{path}.fit")
    for key, message in recipe.hub.clashes(recipe.training) if recipe.hub is not None else ():
        problems.say(f"hub.{key}", message)
    check_together(problems, recipe)
    check_phases(problems, recipe)


def _elsewhere(key: str) -> str | None:
    """The dotted path of a misplaced key in the section it belongs to; None if there is none."""
    for section in _SECTIONS:
        if any(item.name == key for item in dataclasses.fields(section)):
            return f"{section.place}.{key}".lstrip(".")
    return f"training.{key}" if key in training_fields() else None
