"""A recipe is data: YAML and `section.key=value` overrides -> one checked `Recipe`.

Everything that can be known to be wrong is told before any weight is loaded, all of it at once. No code runs from
YAML: tags and resolvers (`${oc.env:...}` would write secrets into saved recipes) are refused, plain references such
as `${output_dir}` are followed. Relative paths in a recipe are relative to the current directory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import GRIDS, DistillConfig, LossTerm
from cankd_hf.config.hub import NO_TOKEN, HubConfig
from cankd_hf.config.recipe_checks import (
    check_fpn,
    check_model_config,
    check_part,
    check_task,
    check_term,
    check_training,
    training_fields,
)
from cankd_hf.config.schema import Reader, nearest
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.config.yaml_source import YamlSource
from cankd_hf.errors import InputError

# What a run may change between two calls without being another run.
_HARMLESS = {
    "baseline",
    "data.cache",
    "data.check",
    "training.dataloader_num_workers",
    "training.disable_tqdm",
    "training.hub_always_push",
    "training.hub_model_id",
    "training.hub_private_repo",
    "training.hub_revision",
    "training.hub_strategy",
    "training.log_figures_steps",
    "training.push_to_hub",
    "training.report_to",
    "training.run_name",
}


@dataclass(kw_only=True)
class Recipe:
    """A whole run, every value checked.

    Attributes:
        task: what is learnt; a name in `cankd_hf.tasks.TASKS`.
        seed: of initial weights, data order and augmentation.
        output_dir: folder of the checkpoints and results.
        data: where the images come from and how they are augmented.
        student: the model to train.
        teacher: the frozen model to learn from; null trains the student alone.
        teachers: instead of `teacher`: several by name, `{dino: {model: ...}, ...}`; each term names its teacher.
        distill: what is compared, and how much it counts.
        baseline: also train the student alone, with the same steps and initial weights, and print the table.
        training: settings of `transformers.TrainingArguments` and of `cankd_hf.CanKDConfig`.
        hub: where the student is pushed; null pushes nothing, unless `training.push_to_hub` asks for it.
    """

    task: str = "segmentation"
    seed: int = 42
    output_dir: str
    data: DataConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)
    baseline: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    hub: HubConfig | None = None

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """All teachers by name; the only one under `teacher:` is called `teacher`."""
        return {"teacher": self.teacher} if self.teacher is not None else dict(self.teachers or {})


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies overrides, and checks everything that can be checked without data or weights.

    Args:
        path: a YAML file.
        overrides: `section.key=value` as on the command line; list items by number (`distill.terms.0.weight=5`),
            `teacher=null` for none.

    Raises:
        InputError: with every problem found, each with its dotted path, file and line.
    """
    path = Path(path)
    if not path.is_file():
        others = [other.name for other in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        hint = nearest(path.name, others) if others else "name a YAML file, for example recipes/quickstart.yaml"
        raise InputError(f"recipe: expected a file, got {str(path)!r}, which is not one; {hint}")
    return parse_recipe(path.read_text(encoding="utf-8"), overrides, source=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """The same as `load_recipe` for YAML in a string; `source` names it in messages."""
    given = YamlSource(text, overrides, source)
    reader = Reader(given.place, _elsewhere)
    data = given.read(reader)
    return _check(reader, data)


def load_data_config(path: str | Path | None, overrides: Sequence[str] = ()) -> DataConfig:
    """The `data:` section of a saved recipe, or of none, with `data.key=value` overrides.

    Args:
        path: a recipe; its other sections are not looked at. None starts from the defaults.
        overrides: `data.key=value`.

    Raises:
        InputError: with every problem found.
    """
    text = Path(path).read_text(encoding="utf-8") if path is not None else ""
    given = YamlSource(text, overrides, str(path) if path is not None else "command line")
    reader = Reader(given.place, _elsewhere)
    for override in overrides:
        if "=" in override and not override.startswith(("data.", "data=")):
            reader.say(override.partition("=")[0], "only data.key=value counts here; leave it out")
    section = given.read(reader).get("data", {})
    reader.read(DataConfig, section, "data")
    config = Reader(lenient=True).read(DataConfig, section, "data")
    if config is not None:
        check_part(reader, config.check_values)
    reader.raise_problems()
    return config


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which `load_recipe` reads back to an equal one. It never holds a token."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, default_flow_style=None, width=119)


def recipe_differences(saved: str, recipe: Recipe) -> list[str]:
    """Where a saved recipe and this one would train differently: `training.max_steps: 100 -> 200`.

    Args:
        saved: YAML as `recipe_to_yaml` wrote it.
        recipe: the recipe now asked for.
    """
    before, now = _flat(yaml.safe_load(saved) or {}), _flat(yaml.safe_load(recipe_to_yaml(recipe)))
    keys = [*before, *(key for key in now if key not in before)]
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in keys
        if before.get(key) != now.get(key) and key not in _HARMLESS and key.split(".")[0] != "hub"
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        inner: leaf
        for key, item in items
        for inner, leaf in _flat(item, f"{path}.{key}" if path else str(key)).items()
    }


def _check(reader: Reader, data: dict[str, Any]) -> Recipe:
    data = _without_tokens(reader, data)
    recipe = reader.section(Recipe, data, "")
    # Sections are looked at one by one, so that a mistake in one does not hide those in another.
    hints = get_type_hints(Recipe)
    parts = {key: Reader(lenient=True).read(hints[key], value, key) for key, value in data.items() if key in hints}
    training = data.get("training")
    if isinstance(training, dict):
        training = check_training(reader, training, "training")
    if isinstance(parts.get("task"), str):
        check_task(reader, parts["task"])
    if parts.get("data") is not None:
        check_part(reader, parts["data"].check_values)
    _check_student(reader, parts.get("student"))
    _check_teacher(reader, parts.get("teacher"))
    _check_distill(reader, data.get("distill"), parts.get("distill"))
    if parts.get("hub") is not None:
        for place, problem in parts["hub"].problems(training or {}):
            reader.say(place, problem)
    if recipe is not None:
        recipe.training = training or {}
        _check_together(reader, recipe)
    reader.raise_problems()
    assert recipe is not None
    return recipe


def _without_tokens(reader: Reader, data: dict[str, Any]) -> dict[str, Any]:
    """The recipe without anything that looks like a token of the Hub in its `hub:` section."""
    hub = data.get("hub")
    if not isinstance(hub, dict):
        return data
    for key in [key for key in hub if "token" in str(key)]:
        reader.say(f"hub.{key}", NO_TOKEN)
    return {**data, "hub": {key: value for key, value in hub.items() if "token" not in str(key)}}


def _check_student(reader: Reader, student: StudentConfig | None) -> None:
    if student is None:
        return
    check_part(reader, student.check)
    if isinstance(student.config, dict):
        check_model_config(reader, student.config, "student.config")
    if isinstance(student.backbone, dict):
        check_model_config(reader, student.backbone, "student.backbone")
    if student.fpn and student.backbone is not None:
        check_fpn(reader, student.fpn, "student.fpn")


def _check_teacher(reader: Reader, teacher: TeacherConfig | None) -> None:
    if teacher is None:
        return
    check_part(reader, teacher.check)
    if isinstance(teacher.config, dict):
        check_model_config(reader, teacher.config, "teacher.config")
    if isinstance(teacher.fit, dict):
        check_training(reader, teacher.fit, "teacher.fit")


def _check_distill(reader: Reader, given: Any, distill: DistillConfig | None) -> None:
    if distill is not None:
        if distill.task_weight < 0:
            reader.say(
                "distill.task_weight", f"expected a number of at least 0, got {distill.task_weight}; 0 needs no labels"
            )
        if distill.grid not in GRIDS:
            hint = nearest(distill.grid, GRIDS)
            reader.say("distill.grid", f"expected one of {', '.join(GRIDS)}, got {distill.grid!r}; {hint}")
    terms = given.get("terms") if isinstance(given, dict) else None
    names: set[str] = set()
    for index, item in enumerate(terms if isinstance(terms, list) else []):
        term = Reader(lenient=True).read(LossTerm, item, "")
        if term is not None:
            check_term(reader, term, f"distill.terms.{index}")
            if term.label in names:
                reader.say(f"distill.terms.{index}", f"a second term called {term.label!r}; give it another `name`")
            names.add(term.label)


def _check_together(reader: Reader, recipe: Recipe) -> None:
    """What only several sections together can tell; a recipe without a teacher becomes plain training."""
    distill = recipe.distill
    if recipe.teacher is None:
        distill.terms = []
        recipe.baseline = False
    active = [term for term in distill.terms if term.weight not in (0, [])]
    if distill.task_weight == 0 and not active:
        what = "a teacher" if recipe.teacher is None else "distill.terms with a weight above 0"
        reader.say(
            "distill.task_weight", f"0 leaves nothing to learn without {what}; give it, or set task_weight to 1"
        )
    elif distill.task_weight == 0 and recipe.baseline:
        reader.say("baseline", "a student alone learns nothing with distill.task_weight: 0; set baseline: false")
    if recipe.student.inherit and recipe.teacher is None:
        reader.say("student.inherit", "copies parts of the teacher, but there is none; give a teacher or leave it out")
    steps = recipe.training.get("max_steps", -1)
    if recipe.data.streaming and not steps > 0:
        reader.say(
            "data.streaming",
            "a stream has no known length; set training.max_steps to the number of optimizer steps to take",
        )
    if recipe.teacher is not None and recipe.teacher.fit is not None and distill.task_weight == 0:
        reader.say(
            "teacher.fit", "fits the teacher to the task, but distill.task_weight: 0 reads no labels; remove one"
        )


def _elsewhere(key: str) -> str | None:
    """The dotted path where a key belongs that was found where it does not."""
    hints = get_type_hints(Recipe)
    sections: dict[str, Any] = {
        "": Recipe,
        "distill": DistillConfig,
        "data": hints["data"],
        "student": hints["student"],
    }
    for section, cls in {**sections, "teacher": TeacherConfig, "hub": HubConfig}.items():
        if any(f.name == key for f in dataclasses.fields(cls)):
            return f"{section}.{key}".lstrip(".")
    if key in {f.name for f in dataclasses.fields(LossTerm)}:
        return f"distill.terms.0.{key}"
    return f"training.{key}" if key in training_fields() else None
