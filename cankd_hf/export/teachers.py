"""The teachers of a student's run, to be timed and scored beside it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from cankd_hf.config.reading import read_recipe, read_text
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.export.files import one_line
from cankd_hf.export.source import Source
from cankd_hf.features.inputs import ImageStats, image_stats
from cankd_hf.hub.files import read_json
from cankd_hf.names import FACTS_FILE, RECIPE_FILE, RESULTS_FILE, TEACHER
from cankd_hf.tasks import TASKS, saved_task
from cankd_hf.teachers.load import load_teacher


@dataclass
class Known:
    """A teacher that is on this machine."""

    name: str  # of its arm: `teacher`, or of several `teacher NAME`
    model: nn.Module
    run: Callable[[Tensor], Any]  # images, normalised as for the student -> its output
    unscored: str | None  # why it has no score; None if it is a model of the student's task


def teachers_of(source: Source) -> tuple[list[Known], list[str]]:
    """The teachers, and a line for each one that cannot be loaded."""
    found, notes = [], []
    try:
        configs = _configs(source)
    except InputError as error:  # a recipe of another version says nothing against the student beside it
        return [], [f"Teachers: left out, what the run says of them cannot be read ({one_line(error)})."]
    for name, config in configs.items():
        arm = TEACHER if len(configs) == 1 else f"{TEACHER} {name}"
        try:
            found.append(_known(arm, config, source))
        except (ImportError, OSError, RuntimeError, ValueError) as error:  # a model of any library
            notes.append(f"{arm}: left out, it cannot be loaded ({one_line(error)}).")
    return found, notes


def recorded_parameters(source: Source) -> int | None:
    """The parameters of the only teacher as the run recorded them."""
    arms = read_json(_root(source) / RESULTS_FILE).get("arms", [])
    return next((arm.get("parameters") for arm in arms if arm.get("name") == TEACHER), None)


def _root(source: Source) -> Path:
    """The folder of the run."""
    folder = Path(source.name)
    return folder.parent if folder.name.startswith("checkpoint-") else folder


def _configs(source: Source) -> dict[str, TeacherConfig]:
    """How each teacher is loaded: by the recipe beside the student, else by what its trainer recorded."""
    recipe = cached_file(source.name, RECIPE_FILE, _raise_exceptions_for_missing_entries=False)
    if recipe is not None:
        read = read_recipe(read_text(recipe), (), str(recipe))[0]
        configs = read.named_teachers()
    else:
        facts = cached_file(source.name, FACTS_FILE, _raise_exceptions_for_missing_entries=False)
        run = {} if facts is None else read_json(Path(facts))
        recorded = run.get("teachers") or ({TEACHER: run["teacher"]} if run.get("teacher") else {})
        configs = {name: TeacherConfig(model=one.get("model")) for name, one in recorded.items()}
    root = _root(source)
    if not configs and (root / TEACHER / "config.json").is_file():
        configs = {TEACHER: TeacherConfig(model=str(root / TEACHER))}
    fitted = {name: root / (TEACHER if len(configs) == 1 else f"{TEACHER}-{name}") for name in configs}
    return {
        name: replace(config, model=str(fitted[name]), config=None, fit=None)
        if (fitted[name] / "config.json").is_file() and (config.fit is not None or not _is_there(config))
        else config
        for name, config in configs.items()
    }


def _is_there(config: TeacherConfig) -> bool:
    return config.model is not None and Path(config.model).is_dir()


def _known(arm: str, config: TeacherConfig, source: Source) -> Known:
    """A teacher as a whole model of the student's task where it is one, else as a backbone that is only timed."""
    if config.fit is not None:
        raise InputError("it was trained in the run, and is not in the run's folder")
    if config.model is None:
        raise InputError("its weights were random")
    if Path(config.model).resolve() == Path(source.name).resolve():
        raise InputError("it is the student itself")
    model = None if config.from_torchvision else _whole(config, source)
    if model is None:
        teacher = load_teacher(replace(config, dtype="float32", compile=False))
        teacher.set_input_stats(*_stats(source))
        return Known(arm, teacher.model, teacher, f"it is no model of {source.task}")
    stats = image_stats(str(config.model), config.revision)
    own = ImageStats(tuple(config.image_mean or stats.mean), tuple(config.image_std or stats.std))
    why = TASKS[source.task].from_model(source.model).why_not_scored(model)
    return Known(arm, model, _renormalised(model, own, *_stats(source)), why)


def _whole(config: TeacherConfig, source: Source) -> PreTrainedModel | None:
    """The teacher with its head, if it is a model of the student's task."""
    kind, name = TASKS[source.task], str(config.model)
    try:
        if saved_task(name) is kind:
            return kind.load(name, config.revision).eval().requires_grad_(False)
    except InputError:  # a net of another library, or nothing: who tries to load it next says so
        return None
    return None


def _stats(source: Source) -> tuple[list[float], list[float]]:
    default = ImageStats()
    mean = source.preprocessor.get("image_mean", default.mean)
    return list(mean), list(source.preprocessor.get("image_std", default.std))


def _renormalised(
    model: PreTrainedModel, own: ImageStats, mean: list[float], std: list[float]
) -> Callable[[Tensor], Any]:
    """The model for images with the student's normalisation."""
    theirs, given = (torch.tensor(values).view(2, 1, 3, 1, 1) for values in ((own.mean, own.std), (mean, std)))
    if torch.equal(theirs, given):
        return lambda images: model(pixel_values=images)
    scale, shift = given[1] / theirs[1], (given[0] - theirs[0]) / theirs[1]
    return lambda images: model(pixel_values=images * scale + shift)
