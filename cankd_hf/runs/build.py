"""Builds models, teachers and trainers from the sections of a recipe."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import IntervalStrategy

from cankd_hf.config.distill import DistillConfig
from cankd_hf.config.places import key_of
from cankd_hf.config.recipe import Recipe, recipe_to_yaml
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.seeds import derived_seed
from cankd_hf.data.common.unlabelled_stream import with_unlabelled
from cankd_hf.errors import InputError, together
from cankd_hf.models.inherit import inherit
from cankd_hf.models.unreadable import NotFetched
from cankd_hf.names import STUDENT, TEACHER
from cankd_hf.runs import adapting
from cankd_hf.runs.device import choices, device_of
from cankd_hf.tasks import TASKS, Task, TaskData
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.objective import Objective
from cankd_hf.training.trainer import CanKDTrainer

logger = logging.getLogger(__name__)


# What code of other libraries raises for settings that it does not look at.
_ODD = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Settings of a trainer that writes no files.
SCORE_ONLY: dict[str, Any] = {
    "report_to": "none",
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
}


def training_args(recipe: Recipe, folder: Path, **overrides: Any) -> CanKDConfig:
    """The Trainer's arguments for one arm of a recipe.

    Raises:
        InputError: for settings that transformers rejects.
    """
    # Trackers show each arm as a separate run.
    out = Path(recipe.output_dir)
    name = recipe.training.get("run_name") or out.resolve().name
    inner = folder.relative_to(out) if folder.is_relative_to(out) else Path(folder.name)
    name = "-".join([name, *inner.parts])
    hub = recipe.hub.settings() if recipe.hub is not None else {}
    # Left open, transformers takes the bar away where its own warnings are hidden, as in commands.
    settings = {"report_to": "none", "disable_tqdm": False, **hub, **recipe.training, "run_name": name, **overrides}
    settings |= choices(device_of(settings), settings)
    task = TASKS[recipe.task]
    if str(settings.get("metric_for_best_model")).removeprefix("eval_") == task.metric:
        settings.setdefault("greater_is_better", task.greater_is_better)
    try:
        return CanKDConfig(output_dir=str(folder), seed=recipe.seed, **settings)
    except InputError:
        raise
    except (*_ODD, ImportError, OSError) as error:
        raise InputError(f"training: {error}") from error


@contextmanager
def problems_of(place: str, section: StudentConfig | TeacherConfig) -> Iterator[None]:
    """Adds the section of the recipe to errors about a model that could not be loaded or built, and to those of one
    that could not be fetched its key, with a local folder as the way out.

    Classes of other libraries raise whatever their code meets in odd settings: an IndexError, a ZeroDivisionError.
    """
    try:
        yield
    except NotFetched as error:
        key = ".".join([place, *(key_of(asdict(section), error.name) or ())])
        said = error.problems[0].removeprefix(f"{key} ")
        raise InputError(f"{key}: {said}; or name a local folder: {key}=FOLDER") from error
    except InputError as error:
        raise InputError([_placed(problem, place) for problem in error.problems]) from error
    except _ODD as error:
        if _short_of_memory(error):
            raise
        raise InputError(f"{place}: cannot be built ({type(error).__name__}: {error}); check its settings") from error


def _placed(problem: str, place: str) -> str:
    """A problem of a model with the place of its section: `teachers.NAME`, also where that is built as a student."""
    kinds = (place.partition(".")[0].rstrip("s"), STUDENT)
    kind = next((kind for kind in kinds if re.match(rf"{kind}\b", problem)), None)
    if kind is None:
        return f"{place}: {problem}"
    rest = problem.removeprefix(kind)
    return place + (f".adapt{rest}" if kind == STUDENT != place and rest.startswith(".fpn") else rest)


def build_student(
    recipe: Recipe, task: Task, config: StudentConfig | None = None, name: str = TEACHER
) -> PreTrainedModel:
    """The student with its initial weights, the same each time.

    With a `config` it is a teacher to be trained; `name` is that of its arm: of several, each starts from its own.
    """
    set_seed(recipe.seed if config is None or name == TEACHER else derived_seed(recipe.seed, name) % 2**32)
    teacher = recipe.named_teachers().get(name)
    place = "student" if config is None else "teacher" if teacher is None else recipe.teacher_path(name)
    with problems_of(place, recipe.student if config is None else teacher or config):
        return task.build_student(recipe.student if config is None else config)


def build_trainer(recipe: Recipe, task: Task, data: TaskData, folder: Path, **overrides: Any) -> CanKDTrainer:
    """The trainer of the last arm of a recipe alone; teachers with `fit` have random weights, adapted ones random
    necks and heads."""
    configs = recipe.named_teachers()
    *found, model = together(
        *(partial(_untrained_teacher, recipe, task, name, config) for name, config in configs.items()),
        partial(build_student, recipe, task),
    )
    teachers = dict(zip(configs, found, strict=True))
    inherited = inherit_parts(recipe, model, teachers, "student")
    return make_trainer(recipe, task, data, model, teachers, training_args(recipe, folder, **overrides), inherited)


def _untrained_teacher(recipe: Recipe, task: Task, name: str, config: TeacherConfig) -> Teacher:
    """A teacher as it is before a run trains it, if it does; one that is to be trained has the classes of the data."""
    if config.adapt is None:
        if config.fit is not None and config.config is not None and task.id2label:
            config = replace(config, config={**config.config, "id2label": dict(task.id2label)})
        return build_teacher(recipe, name, config)
    model = build_student(recipe, task, adapting.untrained(config), name)
    adapting.with_adapters(model, config.adapt)()  # for its problems
    teacher = Teacher(model, replace(config, adapt=None), name=str(config.model))
    teacher.set_input_stats(recipe.data.image_mean, recipe.data.image_std)
    return teacher


def inherit_parts(recipe: Recipe, model: PreTrainedModel, teachers: Mapping[str, Teacher], name: str) -> list[str]:
    """Copies the parts in `student.inherit`, logs what was copied, and returns their labels for tables and cards."""
    teacher = next(iter(teachers.values()), None)
    parts = [] if teacher is None else inherit(model, teacher.model, recipe.student.inherit)
    for part in parts:
        logger.warning("%s: %s", name, part)
    return [part.mark for part in parts]


def make_trainer(
    recipe: Recipe,
    task: Task,
    data: TaskData,
    model: PreTrainedModel,
    teachers: Mapping[str, Teacher],
    args: CanKDConfig,
    inherited: Sequence[str] = (),
    text: str | None = None,
) -> CanKDTrainer:
    """A trainer for the given models, with the terms, taps and data of the recipe; `text` is saved as the recipe."""
    if data.eval is None and args.eval_strategy != IntervalStrategy.NO:
        strategy = IntervalStrategy(args.eval_strategy).value
        raise InputError(
            f"training.eval_strategy: {strategy} needs a validation split, and data.eval_split names "
            'none; name one, or set training.eval_strategy: "no"'
        )
    distill = recipe.distill
    with _refusals():
        trainer = CanKDTrainer(
            model,
            args=args,
            teachers=teachers,
            objective=_objective(distill, bool(teachers)),
            student_taps=recipe.student.taps,
            grid=distill.grid,
            task=task,
            recipe=recipe_to_yaml(recipe) if text is None else text,
            inherited=inherited,
            train_dataset=with_unlabelled(data.train, data.unlabelled, recipe.data.unlabelled_ratio),
            eval_dataset=data.eval,
            processing_class=task.for_model(model).image_processor(recipe.data),
        )
    trainer.probe_dataset = data.probe
    if args.log_figures_steps > 0 and teachers:
        from cankd_hf.figures.callback import FeatureFiguresCallback  # matplotlib: only where it draws

        trainer.add_callback(FeatureFiguresCallback(trainer, args.log_figures_steps))
    if args.prediction_images > 0 and args.eval_strategy != IntervalStrategy.NO:
        from cankd_hf.figures.predictions import PredictionsCallback

        trainer.add_callback(PredictionsCallback(trainer, args.prediction_images))
    return trainer


def _objective(distill: DistillConfig, taught: bool) -> Objective | None:
    """The objective of a recipe; without a teacher its task loss alone."""
    frozen = distill.frozen or ()
    if not taught:
        return Objective(frozen=frozen) if frozen else None
    return Objective(distill.task_weight, distill.terms, frozen, distill.guarding)


@contextmanager
def _refusals() -> Iterator[None]:
    """What the Trainer, accelerate and the models refuse of the settings, as bad input."""
    try:
        yield
    except InputError:
        raise
    except (*_ODD, ImportError) as error:
        if _short_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"recipe: no trainer can be built from its models and training settings ({said})") from error


def _short_of_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "memory" in str(error)


def build_teacher(recipe: Recipe, name: str, config: TeacherConfig) -> Teacher:
    """A teacher of a recipe, with the student's input normalisation; messages call it by its key.

    Random weights are drawn from the recipe's seed and the teacher's name: by all processes and after a resume alike.
    """
    with problems_of(recipe.teacher_path(name), config):
        head = TASKS[recipe.task].teacher_head
        teacher = load_teacher(config, seed=derived_seed(recipe.seed, name), head=head)
    teacher.set_input_stats(recipe.data.image_mean, recipe.data.image_std)
    return teacher
