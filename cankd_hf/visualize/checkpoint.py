"""A checkpoint opened for looking at: students before and after, teacher, connectors, what was logged and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from cankd_hf.config.data import DataConfig
from cankd_hf.config.recipe import Recipe
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import image_stats
from cankd_hf.features.taps import Taps
from cankd_hf.figures import Subject
from cankd_hf.figures.curves import History
from cankd_hf.hub.facts import Facts, read_facts
from cankd_hf.hub.files import RECIPE_FILE, read_json, student_files
from cankd_hf.models import register
from cankd_hf.models.inherit import inherit
from cankd_hf.runs.build import build_student, build_teacher
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import TASKS, Task
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.checkpoint import DISTILLER_FILE, MANIFEST_FILE
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.objective import Objective

STATE_FILE = "trainer_state.json"
# What a student on the Hub is made of; its code is looked for, but never run.
_FROM_HUB = ["*.json", "*.yaml", "*.safetensors", "*.py"]


@dataclass
class OpenedCheckpoint:
    """All that can be looked at.

    Attributes:
        folder: of the student.
        root: of its run; the same, but for a checkpoint-N.
        facts: what was recorded.
        task: what the student does.
        data: how images are read.
        recipe: the saved one with overrides; None where none was saved.
        subjects: the students, the one asked for last.
        teacher: None where there was none, or it cannot be had.
        histories: name of each arm -> what its Trainer logged; the one asked for first.
        notes: what the figures are of, and what had to be left out.
    """

    folder: Path
    root: Path
    facts: Facts
    task: Task
    data: DataConfig
    recipe: Recipe | None
    subjects: list[Subject]
    teacher: Teacher | None = None
    histories: dict[str, History] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_checkpoint(checkpoint: str, overrides: Sequence[str] = ()) -> OpenedCheckpoint:
    """Opens a run, a checkpoint of it, or a student on the Hub. What cannot be had is left out with a note.

    Args:
        checkpoint: folder or Hub id.
        overrides: `section.key=value` changes to the saved recipe.

    Raises:
        InputError: if there is no student, or the overrides do not fit.
    """
    disable_progress_bar()
    register()
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else _from_hub(checkpoint)
    student_files(folder)
    facts = read_facts(folder)
    recipe = _recipe(folder, overrides)
    kind = facts.task if recipe is None else TASKS[recipe.task]
    model = kind.load(folder)
    task = kind.from_model(model)
    in_run = folder.name.startswith("checkpoint-") and (folder.parent / RECIPE_FILE).is_file()
    root = folder.parent if in_run else folder
    data = recipe.data if recipe is not None else _data_beside(folder)
    opened = OpenedCheckpoint(folder, root, facts, task, data, recipe, [])
    if recipe is not None and recipe.teacher is not None:
        opened.teacher = _teacher(opened, recipe, recipe.teacher)
    _add_students(opened, model)
    opened.histories = _histories(opened)
    return opened


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=_FROM_HUB))
    except (HfHubHTTPError, HTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{name}: expected a folder or a Hub id, found neither: {reason}") from error


def _recipe(folder: Path, overrides: Sequence[str]) -> Recipe | None:
    file = folder / RECIPE_FILE
    if file.is_file():
        return load_recipe(file, overrides)
    if overrides:
        raise InputError(f"{overrides[0]}: {folder} holds no recipe.yaml to change; leave it out")
    return None


def _data_beside(folder: Path) -> DataConfig:
    """How images are read, as the image processor beside a student without a recipe says."""
    stats = image_stats(str(folder))
    size = read_json(folder / "preprocessor_config.json").get("size") or {}
    known = {"height", "width"} <= size.keys()
    return DataConfig(
        image_size=[size["height"], size["width"]] if known else None,
        image_mean=list(stats.mean),
        image_std=list(stats.std),
    )


def _teacher(opened: OpenedCheckpoint, recipe: Recipe, config: TeacherConfig) -> Teacher | None:
    """The teacher, where the checkpoint has something that compares with it and it can be had."""
    weights = _distiller_file(opened)
    if weights is None:
        opened.notes.append(
            f"There is no {DISTILLER_FILE} (a pushed student, or its checkpoints are gone), so nothing connects the "
            "student with its teacher: figures that compare them are left out."
        )
        return None
    if config.fit is not None:
        beside = opened.root / "teacher"
        place = beside if beside.is_dir() else Path(recipe.output_dir) / "teacher"
        config = replace(config, model=str(place), config=None, fit=None)
    try:
        teacher = build_teacher(recipe, config)
    except InputError as error:
        opened.notes.append(
            f"The teacher could not be loaded ({'; '.join(error.problems)}): figures that need it are left out. "
            "Name it with teacher.model=..."
        )
        return None
    then = read_json(weights.parent / MANIFEST_FILE).get("fingerprint")
    if then not in (None, teacher.fingerprint):
        opened.notes.append(
            f"The teacher here ({teacher.name}) is not the one of the training (other weights): distances to it mean "
            "nothing."
        )
    return teacher


def _distiller_file(opened: OpenedCheckpoint) -> Path | None:
    """Connectors and losses: the checkpoint's own; for a run those of the student's step, else the newest."""
    if (opened.folder / DISTILLER_FILE).is_file():
        return opened.folder / DISTILLER_FILE
    own = opened.folder / f"checkpoint-{opened.facts.run.get('step')}" / DISTILLER_FILE
    newest = get_last_checkpoint(str(opened.folder))
    if own.is_file() or newest is None:
        return own if own.is_file() else None
    file = Path(newest) / DISTILLER_FILE
    return file if file.is_file() else None


def _add_students(opened: OpenedCheckpoint, model: PreTrainedModel) -> None:
    """Before, alone and after, as far as they can be had."""
    recipe = opened.recipe
    taps = recipe.student.taps if recipe is not None else "auto"
    if recipe is not None:
        try:
            before = build_student(recipe, opened.task)
        except InputError as error:
            opened.notes.append(f"The initial student cannot be built again and is left out: {error.problems[0]}")
        else:
            if recipe.student.inherit and opened.teacher is not None:
                inherit(before, opened.teacher.model, recipe.student.inherit)
            if opened.teacher is not None or not recipe.student.inherit:
                distiller = None if opened.teacher is None else _distiller(recipe, before, opened.teacher)
                found = distiller.taps if distiller is not None and distiller.taps is not None else Taps(before, taps)
                opened.subjects.append(Subject("student before", found, distiller))
            else:
                opened.notes.append("The initial student inherits parts of a teacher that is not here: left out.")
    alone = opened.root / "alone"
    if (alone / "config.json").is_file() and (alone / "arm.json").is_file():
        opened.subjects.append(Subject("student alone", Taps(opened.task.load(alone), taps)))
    weights = None if opened.teacher is None else _distiller_file(opened)
    if recipe is None or opened.teacher is None or weights is None:
        opened.subjects.append(Subject("student", Taps(model, taps)))
        return
    distiller = _distiller(recipe, model, opened.teacher)
    _load(distiller, weights, opened)
    assert distiller.taps is not None
    opened.subjects.append(Subject("student after", distiller.taps, distiller))


def _distiller(recipe: Recipe, model: PreTrainedModel, teacher: Teacher) -> Distiller:
    """Connectors and losses as they were before the first step: drawn as the trainer draws them."""
    size = recipe.data.crop_size or recipe.data.image_size or [224, 224]
    image_size = (size[0], size[1])
    torch.manual_seed(recipe.seed)
    distill = recipe.distill
    objective = Objective(distill.task_weight, distill.terms)
    return Distiller(model, objective, teacher.levels(image_size), image_size, recipe.student.taps, distill.grid)


def _load(distiller: Distiller, weights: Path, opened: OpenedCheckpoint) -> None:
    state = load_file(weights)
    own_state = {name: value for name, value in distiller.state_dict().items() if not name.startswith("student.")}
    expected, found = ({(name, *value.shape) for name, value in named.items()} for named in (own_state, state))
    if expected != found:
        odd = sorted({name for name, *_ in expected ^ found})
        raise InputError(
            f"{weights}: expected the connectors and losses of the recipe, got others (first {odd[0]}); leave out "
            "changes to student, teacher and distill"
        )
    distiller.load_state_dict(state, strict=False)
    step, own = weights.parent.name.removeprefix("checkpoint-"), opened.facts.run.get("step")
    if own is not None and step.isdecimal() and int(step) != own:
        opened.notes.append(
            f"The student is of step {own} (the best), its connectors and losses of step {step}: their checkpoint of "
            f"step {own} is gone."
        )


def _histories(opened: OpenedCheckpoint) -> dict[str, History]:
    name = "student" if opened.recipe is None or opened.recipe.teacher is None else "student distilled"
    files = {name: opened.folder / STATE_FILE}
    files |= {"student alone": opened.root / "alone" / STATE_FILE, "teacher": opened.root / "teacher" / STATE_FILE}
    found = {arm: read_json(file).get("log_history") or [] for arm, file in files.items()}
    return {arm: history for arm, history in found.items() if history or arm == name}
