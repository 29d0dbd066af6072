"""From a checked recipe to trained students: builds the objects, trains the arms, keeps what is finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from cankd_hf.checkpoint import SafeStop, Stopwatch
from cankd_hf.config import CanKDConfig
from cankd_hf.errors import InputError
from cankd_hf.hub.publish import open_target, publish
from cankd_hf.launch import check_launch
from cankd_hf.models.inherit import inherit
from cankd_hf.models.student_config import StudentConfig
from cankd_hf.recipe import Recipe, recipe_differences, recipe_to_yaml
from cankd_hf.tasks import TASKS, Task, TaskData
from cankd_hf.teacher import Teacher, TeacherConfig, load_teacher
from cankd_hf.trainer import CanKDTrainer

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.json"
RECIPE_FILE = "recipe.yaml"
# Settings of a trainer that leaves nothing behind.
SCORE_ONLY: dict[str, Any] = {
    "report_to": "none",
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
}


class Stopped(Exception):
    """The user stopped the run; what is needed to go on is saved in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(str(folder))


@dataclass
class Arm:
    """One trained (or only evaluated) model of a run and what it reached."""

    name: str
    folder: str
    scores: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    steps: int = 0
    seconds: float = 0.0
    inherited: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The end of a run: all arms in the order of the result table."""

    task: str
    metric: str
    split: str
    arms: list[Arm]
    output_dir: str
    facts: dict[str, Any] = field(default_factory=dict)

    def gap_closed(self) -> float | None:
        """Share of the gap between student alone and teacher that distillation closed; None where unmeasured."""
        found = {arm.name: arm.scores.get(self.metric) for arm in self.arms}
        teacher, alone, distilled = (found.get(name) for name in ("teacher", "student alone", "student distilled"))
        if teacher is None or alone is None or distilled is None or teacher <= alone:
            return None
        return (distilled - alone) / (teacher - alone)


def training_args(recipe: Recipe, folder: Path, **overrides: Any) -> CanKDConfig:
    """The Trainer's arguments for one arm of a recipe.

    Raises:
        InputError: for settings that transformers refuses.
    """
    # Trackers show each arm as a run of its own.
    out = Path(recipe.output_dir)
    name = recipe.training.get("run_name") or out.resolve().name
    name = name if folder == out else f"{name}-{folder.name}"
    hub = recipe.hub.settings() if recipe.hub is not None else {}
    settings = {"report_to": "none", **hub, **recipe.training, "run_name": name, **overrides}
    try:
        return CanKDConfig(output_dir=str(folder), seed=recipe.seed, **settings)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {error}") from error


@contextmanager
def problems_of(place: str) -> Iterator[None]:
    """Says in which section of the recipe a model stands that could not be had."""
    try:
        yield
    except InputError as error:
        raise InputError([p if p.startswith(place) else f"{place}: {p}" for p in error.problems]) from error


def build_student(recipe: Recipe, task: Task, config: StudentConfig | None = None) -> PreTrainedModel:
    """The student with its initial weights, the same each time."""
    set_seed(recipe.seed)
    with problems_of("student" if config is None else "teacher"):
        return task.build_student(recipe.student if config is None else config)


def build_trainer(recipe: Recipe, task: Task, data: TaskData, folder: Path, **overrides: Any) -> CanKDTrainer:
    """The trainer of a recipe's last arm, on its own: a teacher that is to be fitted has its random start."""
    teacher = None
    if recipe.teacher is not None:
        stats = (list(recipe.data.image_mean), list(recipe.data.image_std))
        teacher = build_teacher(replace(recipe.teacher, fit=None), stats)
    model = build_student(recipe, task)
    inherited = inherit_parts(recipe, model, teacher, "student")
    trainer = make_trainer(recipe, task, data, model, teacher, training_args(recipe, folder, **overrides))
    trainer.inherited = inherited
    return trainer


def inherit_parts(recipe: Recipe, model: PreTrainedModel, teacher: Teacher | None, name: str) -> list[str]:
    """Copies what `student.inherit` names, says what fitted, and returns how tables and cards mark it."""
    parts = [] if teacher is None else inherit(model, teacher.model, recipe.student.inherit)
    for part in parts:
        logger.warning("%s: %s", name, part)
    return [part.mark for part in parts]


def make_trainer(
    recipe: Recipe, task: Task, data: TaskData, model: PreTrainedModel, teacher: Teacher | None, args: CanKDConfig
) -> CanKDTrainer:
    """A trainer for given models, with what the recipe says of terms, taps and data."""
    distill = recipe.distill
    if data.eval is None and args.eval_strategy != IntervalStrategy.NO:
        raise InputError(
            f"training.eval_strategy: {args.eval_strategy.value} needs a validation split, and data.eval_split names "
            'none; name one, or set training.eval_strategy: "no"'
        )
    trainer = CanKDTrainer(
        model,
        teacher,
        args,
        terms=distill.terms if teacher is not None else None,
        task_weight=distill.task_weight if teacher is not None else 1.0,
        student_taps=recipe.student.taps,
        grid=distill.grid,
        task=task,
        recipe=recipe_to_yaml(recipe),
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=task.image_processor(recipe.data),
    )
    if args.log_figures_steps > 0 and teacher is not None:
        from cankd_hf.figures.callback import FeatureFiguresCallback  # matplotlib: only where it draws

        trainer.add_callback(FeatureFiguresCallback(trainer, args.log_figures_steps))
    return trainer


def build_teacher(config: TeacherConfig, image_stats: tuple[list[float], list[float]]) -> Teacher:
    """The teacher of a recipe, told how the student's images are normalised."""
    with problems_of("teacher"):
        teacher = load_teacher(config)
    teacher.set_input_stats(*image_stats)
    return teacher


def run(recipe: Recipe, restart: bool = False, resume: str | None = None) -> Report:
    """Trains what the recipe asks for, evaluates it and writes the results; what an earlier call finished is kept.

    Args:
        recipe: a checked recipe.
        restart: start over even where checkpoints of the same recipe exist.
        resume: a checkpoint folder of the last arm to go on from, instead of the newest.

    Raises:
        InputError: for bad input.
        Stopped: after Ctrl-C, with a checkpoint saved.
    """
    disable_progress_bar()  # of loading and saving weights; training has its own
    out = Path(recipe.output_dir)
    args = training_args(recipe, out)
    check_launch(args.world_size)
    _claim(out, recipe, restart, args)
    open_target(out, args)
    task, data = TASKS[recipe.task].from_data(recipe.data, labelled=recipe.distill.task_weight > 0)
    session = _Session(recipe, task, data, restart, resume)
    teacher_config = recipe.teacher
    arms = []
    if teacher_config is not None and teacher_config.fit is not None:
        arms.append(session.fit_teacher(teacher_config))
        teacher_config = replace(teacher_config, model=str(out / "teacher"), config=None, fit=None)
    teacher = None
    if teacher_config is not None:
        teacher = build_teacher(teacher_config, (list(recipe.data.image_mean), list(recipe.data.image_std)))
        session.teacher = teacher
        if not arms and (scored := session.score_teacher(teacher)) is not None:
            arms.append(scored)
    if teacher is not None and recipe.baseline:
        arms.append(session.train("student alone", out / "alone", None))
    name = "student" if teacher is None else "student distilled"
    arms.append(session.train(name, out, teacher))
    report = Report(recipe.task, task.metric, session.split, arms, str(out), data.facts)
    if args.process_index == 0:
        session.picture(report)
        _write(out / RESULTS_FILE, {**_as_dict(report), "gap_closed": report.gap_closed()})
    publish(out, args)
    return report


def _claim(out: Path, recipe: Recipe, restart: bool, args: CanKDConfig) -> None:
    """Makes the output folder this recipe's own: work of another recipe is never mixed in, nor thrown away."""
    file = out / RECIPE_FILE
    with args.main_process_first(local=False, desc="claiming the output folder"):
        if restart and _holds_work(out):
            _set_aside(out)
        elif file.is_file() and _holds_work(out):
            differences = recipe_differences(file.read_text(encoding="utf-8"), recipe)
            if differences:
                raise InputError(
                    f"output_dir {out}: holds a run of another recipe ({'; '.join(differences[:5])}); choose another "
                    "output_dir, or start over in this one with --restart, which moves the old one aside"
                )
        if args.process_index == 0:
            out.mkdir(parents=True, exist_ok=True)
            file.write_text(recipe_to_yaml(recipe), encoding="utf-8")


def _holds_work(out: Path) -> bool:
    """Whether anything was trained there: a checkpoint or a finished arm, of the run or of its other arms."""
    return any(
        True for pattern in ("checkpoint-*", "arm.json") for depth in ("", "*/") for _ in out.glob(depth + pattern)
    )


def _set_aside(out: Path) -> None:
    """Renames a folder of earlier work, so that none of its checkpoints is taken for one of the new run."""
    if out.resolve() == Path.cwd().resolve():
        raise InputError(f"output_dir {out}: cannot be moved aside, it is the current folder; name another one")
    number = next(n for n in count(1) if not out.with_name(f"{out.name}.before{n}").exists())
    target = out.with_name(f"{out.name}.before{number}")
    out.rename(target)
    logger.warning("starting over: what was in %s is now in %s", out, target)


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    partial.replace(file)


def _as_dict(report: Report) -> dict[str, Any]:
    return {**vars(report), "arms": [vars(arm) for arm in report.arms]}


class _Session:
    """What the arms of one run share."""

    def __init__(self, recipe: Recipe, task: Task, data: TaskData, restart: bool, resume: str | None) -> None:
        self.recipe, self.task, self.data = recipe, task, data
        self.restart, self.resume = restart, resume
        self.teacher: Teacher | None = None
        self.split, self.scored_set = ("test", data.test) if data.test is not None else ("validation", data.eval)

    def fit_teacher(self, config: TeacherConfig) -> Arm:
        """Trains the teacher itself first, where the recipe has no trained one."""
        student = StudentConfig(model=config.model, config=config.config)
        return self.train("teacher", Path(self.recipe.output_dir) / "teacher", None, student, **(config.fit or {}))

    def train(
        self, name: str, folder: Path, teacher: Teacher | None, student: StudentConfig | None = None, **overrides: Any
    ) -> Arm:
        done = self._finished(folder, name)
        if done is not None:
            logger.warning("%s: finished before, kept (%s); --restart trains it again", name, folder)
            return done
        if folder != Path(self.recipe.output_dir):
            overrides["push_to_hub"] = False  # the run's repository is for its student
        args = training_args(self.recipe, folder, **overrides)
        # Every arm starts from the same weights and sees the same images.
        model = build_student(self.recipe, self.task, student)
        inherited = [] if student is not None else inherit_parts(self.recipe, model, self.teacher, name)
        trainer = make_trainer(self.recipe, self.task, self.data, model, teacher, args)
        trainer.inherited = inherited
        checkpoint = self._checkpoint(folder, name)
        logger.warning("%s: training %s -> %s", name, "from " + checkpoint if checkpoint else "from the start", folder)
        stopwatch = Stopwatch()
        trainer.add_callback(stopwatch)
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = stopwatch.seconds
        if _stopped(trainer):
            raise Stopped(folder)
        trainer.save_model(str(folder), _internal_call=True)  # pushed at the end, when there are scores
        scores = self._scores(trainer)
        steps = trainer.state.global_step
        arm = Arm(name, str(folder), scores, model.num_parameters(), steps, round(seconds, 1), inherited)
        if args.process_index == 0:
            trainer.state.save_to_json(str(folder / "trainer_state.json"))
            _write(folder / "arm.json", {**vars(arm), "taps": _taps(trainer)})
        return arm

    def score_teacher(self, teacher: Teacher) -> Arm | None:
        """The teacher's own score, on images normalised its way; None where it does not do this very task."""
        folder = teacher.config.model
        if folder is None or self.task.evaluates_features or not self.task.accepts(teacher.model):
            return None
        model = self.task.load(folder, teacher.config.revision)
        if dict(model.config.id2label) != dict(getattr(self.task, "id2label", {})):
            logger.warning("teacher: knows other classes than the data have; it is not scored")
            return None
        args = training_args(self.recipe, Path(self.recipe.output_dir), **SCORE_ONLY)
        trainer = CanKDTrainer(model, None, args, task=self.task)
        dataset = self.scored_set
        mean, std = list(teacher.stats.mean), list(teacher.stats.std)
        if dataset is not None and (mean, std) != (self.recipe.data.image_mean, self.recipe.data.image_std):
            config = replace(self.recipe.data, image_mean=mean, image_std=std, check="none")
            role = "test" if self.split == "test" else "eval"
            data = type(self.task).from_data(config, splits=(role,))[1]
            dataset = data.test if role == "test" else data.eval
        return Arm("teacher", folder, self._scores(trainer, dataset), model.num_parameters())

    def picture(self, report: Report) -> None:
        if self.scored_set is None:
            return
        models = {arm.name: self.task.load(arm.folder) for arm in report.arms if Path(arm.folder).is_dir()}
        self.task.picture(self.scored_set, models, Path(report.output_dir) / "predictions.png", self.recipe.data)

    def _scores(self, trainer: CanKDTrainer, dataset: Any = None) -> dict[str, float]:
        dataset = self.scored_set if dataset is None else dataset
        if dataset is None:
            return {}
        metrics = trainer.evaluate(dataset, metric_key_prefix=self.split)
        prefix = f"{self.split}_"
        return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}

    def _finished(self, folder: Path, name: str) -> Arm | None:
        file = folder / "arm.json"
        if self.restart or not file.is_file():
            return None
        saved = json.loads(file.read_text(encoding="utf-8"))
        saved.pop("taps", None)
        return Arm(**saved) if saved["name"] == name else None

    def _checkpoint(self, folder: Path, name: str) -> str | None:
        if name.startswith("student") and name != "student alone" and self.resume is not None:
            return self.resume
        return get_last_checkpoint(str(folder)) if folder.is_dir() and not self.restart else None


def _stopped(trainer: CanKDTrainer) -> bool:
    return any(isinstance(callback, SafeStop) and callback.stopped for callback in trainer.callback_handler.callbacks)


def _taps(trainer: CanKDTrainer) -> list[dict[str, Any]]:
    return [vars(level) for level in trainer._distiller.levels]
