"""Opens a checkpoint for figures: students before and after, teachers, connectors, logged and measured numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from cankd_hf.config.data import DataConfig
from cankd_hf.config.parts import part_of
from cankd_hf.config.recipe import Recipe
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import image_stats
from cankd_hf.features.taps import Taps
from cankd_hf.figures import Subject
from cankd_hf.figures.curves import History
from cankd_hf.hub.facts import Facts, read_facts
from cankd_hf.hub.files import read_json, student_files
from cankd_hf.models import register
from cankd_hf.models.inherit import inherit
from cankd_hf.names import ALONE, ARM_FILE, DISTILLED, DISTILLER_FILE, MANIFEST_FILE, RECIPE_FILE, STATE_FILE, STUDENT
from cankd_hf.runs.build import build_student, build_teacher
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import TASKS, Task
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.objective import Objective
from cankd_hf.training.setup import teacher_shapes

# The files of a student on the Hub; its code must be there, but is never run.
_FROM_HUB = ["*.json", "*.yaml", "*.safetensors", "*.py"]


@dataclass
class OpenedCheckpoint:
    """All that figures are made from."""

    folder: Path  # of the student
    root: Path  # of its run; differs from `folder` for a checkpoint-N
    facts: Facts
    task: Task
    data: DataConfig
    recipe: Recipe | None  # the saved one with overrides
    subjects: list[Subject] = field(default_factory=list)  # the students, the requested one last
    teachers: dict[str, Teacher] = field(default_factory=dict)  # empty if there was none, or one cannot be loaded
    histories: dict[str, History] = field(default_factory=dict)  # arm -> its Trainer's log; the requested one first
    notes: list[str] = field(default_factory=list)  # what is left out of the figures, and why


def open_checkpoint(checkpoint: str, overrides: Sequence[str] = ()) -> OpenedCheckpoint:
    """Opens a run, a checkpoint of it, or a student on the Hub. What cannot be loaded is left out with a note.

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
    opened = OpenedCheckpoint(folder, root, facts, task, data, recipe)
    saved = None if recipe is None else _saved_at(opened)
    if recipe is not None and recipe.phases:
        recipe, saved = _of_phase(recipe, folder, root)
        opened.recipe = recipe
    if recipe is not None and recipe.named_teachers():
        opened.teachers = _teachers(opened, recipe, saved)
    _add_students(opened, model, saved)
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
    """How images are read, from the image processor beside a student without a recipe."""
    stats = image_stats(str(folder))
    size = read_json(folder / "preprocessor_config.json").get("size") or {}
    known = {"height", "width"} <= size.keys()
    return DataConfig(
        image_size=[size["height"], size["width"]] if known else None,
        image_mean=list(stats.mean),
        image_std=list(stats.std),
    )


def _teachers(opened: OpenedCheckpoint, recipe: Recipe, saved: Path | None) -> dict[str, Teacher]:
    """The teachers; none if one of them cannot be loaded."""
    configs, teachers = recipe.named_teachers(), {}
    manifests = {} if saved is None else read_json(saved / MANIFEST_FILE)
    for name, config in configs.items():
        if config.fit is not None:
            beside = opened.root / _arm_of(recipe, name).replace(" ", "-")
            place = beside if beside.is_dir() else Path(recipe.output_dir) / beside.name
            config = config.fitted(place)
        try:
            teachers[name] = teacher = build_teacher(recipe, name, config)
        except InputError as error:
            opened.notes.append(
                f"The {_arm_of(recipe, name)} could not be loaded ({'; '.join(error.problems)}): figures that need it "
                f"are left out. Name it with {recipe.teacher_path(name)}.model=..."
            )
            return {}
        then = (manifests if len(configs) == 1 else manifests.get(name) or {}).get("fingerprint")
        if then not in (None, teacher.fingerprint):
            opened.notes.append(
                f"The {_arm_of(recipe, name)} here ({teacher.name}) is not the one of the training (other weights): "
                "distances to it mean nothing."
            )
    return teachers


def _arm_of(recipe: Recipe, name: str) -> str:
    """What a run calls a teacher: `teacher`, or of several `teacher NAME`."""
    return "teacher" if len(recipe.named_teachers()) == 1 else f"teacher {name}"


def _saved_at(opened: OpenedCheckpoint) -> Path | None:
    """Where the facts of the teachers, and what connects with them, are: in the folder itself; for a run in the
    checkpoint of the student's step, else in the newest."""
    newest = get_last_checkpoint(str(opened.folder))
    own = opened.folder / f"checkpoint-{opened.facts.run.get('step')}"
    return _taught([opened.folder, own, *([Path(newest)] if newest is not None else [])])


def _taught(folders: Sequence[Path]) -> Path | None:
    """The first folder that was saved with a teacher. Losses without weights of their own leave only its manifest."""
    names = (DISTILLER_FILE, MANIFEST_FILE)
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def _of_phase(recipe: Recipe, folder: Path, root: Path) -> tuple[Recipe, Path | None]:
    """The recipe with the losses of a phase, and where it was saved: of the one that the folder is of, for a whole run
    of the last one that has any."""
    phases = recipe.phases or []
    names = [f"phase-{number}-{phase.name}" for number, phase in enumerate(phases, 1)]
    own = names.index(root.name) if root.name in names else len(phases) - 1
    found = [own] if folder != root or root.name in names else list(reversed(range(len(phases))))
    for index in found:
        place = root if index == own else root / names[index]
        newest = get_last_checkpoint(str(place)) if place.is_dir() else None
        folders = [folder if index == own else place]
        folders += [Path(newest)] if newest is not None and folder == root else []
        saved, distill = _taught(folders), part_of(recipe, phases[index]).distill
        if distill.terms and saved is not None:
            return replace(recipe, distill=distill, phases=None), saved
    return replace(recipe, phases=None), None


def _add_students(opened: OpenedCheckpoint, model: PreTrainedModel, saved: Path | None) -> None:
    """Adds the student before, alone and after, as far as available."""
    recipe, after = opened.recipe, None
    if recipe is not None and opened.teachers:
        after = _subject("student after", recipe, model, opened.teachers)
        if not _load(after, saved, opened):
            opened.teachers, after = {}, None
    teachers = opened.teachers
    taps = recipe.student.taps if recipe is not None else "auto"
    if recipe is not None:
        try:
            before = build_student(recipe, opened.task)
        except InputError as error:
            opened.notes.append(f"The initial student cannot be built again and is left out: {error.problems[0]}")
        else:
            for teacher in teachers.values():
                inherit(before, teacher.model, recipe.student.inherit)
            if teachers:
                opened.subjects.append(_subject("student before", recipe, before, teachers))
            elif not recipe.student.inherit:
                opened.subjects.append(Subject("student before", Taps(before, taps)))
            else:
                opened.notes.append("The initial student inherits parts of a teacher that is not here: left out.")
    alone = opened.root / "alone"
    if (alone / "config.json").is_file() and (alone / ARM_FILE).is_file():
        opened.subjects.append(Subject(ALONE, Taps(opened.task.load(alone), taps)))
    opened.subjects.append(after or Subject("student", Taps(model, taps)))


def _subject(name: str, recipe: Recipe, model: PreTrainedModel, teachers: dict[str, Teacher]) -> Subject:
    """A student with connectors and losses as before the first step, initialised as in the trainer."""
    height, width = recipe.data.crop_size or recipe.data.image_size or [224, 224]
    distill, data = recipe.distill, recipe.data
    objective = Objective(distill.task_weight, distill.terms, distill.frozen or (), distill.guarding)
    shapes = teacher_shapes(teachers, objective, data.image_mean, data.image_std, (height, width))
    torch.manual_seed(recipe.seed)
    distiller = Distiller(model, objective, shapes, (height, width), recipe.student.taps, distill.grid)
    return Subject(name, distiller.taps or Taps(model, recipe.student.taps), distiller)


def _load(subject: Subject, saved: Path | None, opened: OpenedCheckpoint) -> bool:
    """Loads connectors and losses, if they have weights. Returns whether they are as they were trained."""
    distiller = subject.distiller
    assert distiller is not None
    weights = None if saved is None else saved / DISTILLER_FILE
    own_state = {name: value for name, value in distiller.state_dict().items() if not name.startswith("student.")}
    if weights is None or not weights.is_file():
        if own_state:
            opened.notes.append(
                f"There is no {DISTILLER_FILE} (a pushed student, or its checkpoints are gone), so nothing connects "
                "the student with its teacher: figures that compare them are left out."
            )
        return not own_state
    state = load_file(weights)
    expected, found = ({(name, *value.shape) for name, value in named.items()} for named in (own_state, state))
    if expected != found:
        odd = sorted({name for name, *_ in expected ^ found})
        raise InputError(
            f"{weights}: expected the connectors and losses of the recipe, got others (first {odd[0]}); leave out "
            "changes to student, teacher and distill"
        )
    distiller.load_state_dict(state, strict=False)
    if opened.facts.run.get("phases"):
        return True  # whose steps are those of all of them
    step, own = weights.parent.name.removeprefix("checkpoint-"), opened.facts.run.get("step")
    if own is not None and step.isdecimal() and int(step) != own:
        opened.notes.append(
            f"The student is of step {own} (the best), its connectors and losses of step {step}: their checkpoint of "
            f"step {own} is gone."
        )
    return True


def _histories(opened: OpenedCheckpoint) -> dict[str, History]:
    recipe = opened.recipe
    arms = [] if recipe is None else [_arm_of(recipe, teacher) for teacher in recipe.named_teachers()]
    name = DISTILLED if arms else STUDENT
    files = {name: opened.folder / STATE_FILE, ALONE: opened.root / "alone" / STATE_FILE}
    files |= {arm: opened.root / arm.replace(" ", "-") / STATE_FILE for arm in arms or ["teacher"]}
    found = {arm: read_json(file).get("log_history") or [] for arm, file in files.items()}
    return {arm: history for arm, history in found.items() if history or arm == name}
