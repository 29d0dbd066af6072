"""Runs a checked recipe: trains its arms (teachers, student alone, distilled student) and writes the results."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from cankd_hf.config.parts import part_of, terms_of
from cankd_hf.config.recipe import Recipe, recipe_to_yaml
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.decode import Unusable, WrongLabels
from cankd_hf.errors import InputError, together
from cankd_hf.hub.files import read_json
from cankd_hf.hub.publish import open_target, publish
from cankd_hf.names import ALONE, ARM_FILE, DISTILLED, FACTS_FILE, PICTURE_FILE, RESULTS_FILE, STATE_FILE, STUDENT
from cankd_hf.runs import adapting
from cankd_hf.runs.arms import finished_arm, write_arm
from cankd_hf.runs.build import (
    SCORE_ONLY,
    build_student,
    build_teacher,
    inherit_parts,
    make_trainer,
    problems_of,
    training_args,
)
from cankd_hf.runs.clock import run_clock
from cankd_hf.runs.details import details_of, read_details, write_details
from cankd_hf.runs.device import device_of, told
from cankd_hf.runs.folder import claim, claim_data, expect_change, set_aside
from cankd_hf.runs.phases import Part, open_phase, parts_of, problems_in
from cankd_hf.runs.record import Arm, Report, as_dict, write_json
from cankd_hf.runs.session import check_session
from cankd_hf.runs.sharing import Sharing
from cankd_hf.tasks import TASKS, Task, TaskData
from cankd_hf.tasks.panels import Stats
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.callbacks import Stopwatch
from cankd_hf.training.checkpoint_files import DISK_FULL, check_folder, chosen, writing
from cankd_hf.training.lock import FolderLock
from cankd_hf.training.monitoring.cost import CostMeter
from cankd_hf.training.trainer import CanKDTrainer

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The user stopped the run; a checkpoint to resume from is in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(str(folder))


def run(
    recipe: Recipe,
    restart: bool = False,
    resume: str | None = None,
    notes: Sequence[str] = (),
    sharing: Sharing | None = None,
) -> Report:
    """Trains and evaluates all arms of a recipe and writes the results; arms finished by an earlier call are kept.

    Args:
        recipe: a checked recipe.
        restart: start over even where checkpoints of the same recipe exist.
        resume: checkpoint folder to resume the last arm from, instead of the newest one.
        notes: lines for the log, once all is checked and the first arm begins.
        sharing: this run's part in teachers that it shares with others, see `sharing.py`.

    Raises:
        InputError: for bad input.
        Stopped: after Ctrl-C, with a checkpoint saved.
    """
    if recipe.students:
        raise InputError("students: each has a run of its own; see cankd_hf.runs.students.run_all")
    disable_progress_bar()  # of loading and saving weights; training has its own
    out = Path(recipe.output_dir)
    check_session(recipe, restart)
    args = training_args(recipe, out)
    main = args.process_index == 0
    if main:
        check_folder(out)
        if restart:
            with FolderLock(out):  # never moves a run that is going on
                pass
            set_aside(out)
        notes = [*notes, told(device_of(recipe.training), recipe)]
    with FolderLock(out) if main else nullcontext(), writing(out, DISK_FULL):
        return _run(recipe, args, resume, notes if main else (), sharing)


def _run(
    recipe: Recipe, args: CanKDConfig, resume: str | None, notes: Sequence[str], sharing: Sharing | None
) -> Report:
    out = Path(recipe.output_dir)
    claim(out, recipe, args)
    open_target(out, args, asdict(recipe))
    task, data = TASKS[recipe.task].from_data(recipe.data, labelled=recipe.labelled)
    claim_data(out, recipe, data, args)
    session = _Session(recipe, task, data, resume, sharing)
    session.open_phases()
    arms = session.prepare_teachers(notes)
    parts = session.parts(recipe, DISTILLED if session.teachers else STUDENT, out)
    session.rehearse(parts)
    if session.teachers and recipe.baseline:
        alone = replace(recipe, teacher=None, teachers=None).resolved()
        arms.append(session.train_arm(session.parts(alone, ALONE, out / "alone"), {}))
    arms.append(session.train_arm(parts, session.teachers))
    report = Report(recipe.task, task.metric, session.split, arms, str(out), data.facts, task.greater_is_better)
    report.findings = [*read_json(out / FACTS_FILE).get("teacher_findings", []), *report.weak_teachers()]
    if args.process_index == 0:
        for finding in report.weak_teachers():
            logger.warning("%s", finding)
        write_json(out / RESULTS_FILE, {**as_dict(report), "gap_closed": report.gap_closed()})
        session.picture(report)  # last: whatever happens to it, the results are there
    publish(out, args)
    return report


class _Session:
    """State shared by the arms of one run."""

    def __init__(
        self, recipe: Recipe, task: Task, data: TaskData, resume: str | None, sharing: Sharing | None
    ) -> None:
        self.recipe, self.task, self.data, self.resume, self.sharing = recipe, task, data, resume, sharing
        self.teachers: dict[str, Teacher] = {}
        self.details: dict[str, dict[str, Any]] = {}  # by name of the arm, of those that were scored
        self.stats: dict[str, Stats] = {}  # normalisation of the images of teachers that were not trained here
        self._opened: dict[str, TaskData] = {}  # of phases with data of their own
        self.split, self.scored_set = ("test", data.test) if data.test is not None else ("validation", data.eval)
        self.clock = run_clock(recipe, data, self.scored_set)

    def prepare_teachers(self, notes: Sequence[str]) -> list[Arm]:
        """Trains the teachers that have `fit`, and loads all of them; returns the arms of those with scores.

        The notes are logged when the last error is told.
        """
        arms = []
        configs = self.recipe.named_teachers()
        for name in configs.keys() - {term.teacher for term in terms_of(self.recipe)} if len(configs) > 1 else ():
            logger.warning("teacher %s: no term of distill.terms learns from it", name)
        ready = [name for name, config in configs.items() if config.fit is None]
        *loaded, _ = together(  # the student is built for its problems only, which are told with those of its teachers
            *(partial(self._load, name, configs[name]) for name in ready),
            partial(build_student, self.recipe, self.task),
        )
        for note in notes:
            logger.warning("%s", note)
        self.teachers.update(zip(ready, loaded, strict=True))
        for name, config in configs.items():
            several = len(configs) > 1
            arm = f"teacher {name}" if several else "teacher"
            folder = Path(self.recipe.output_dir) / (f"teacher-{name}" if several else "teacher")
            scored = None
            if config.fit is not None:
                plain = self._plain(self.recipe)
                plain = replace(plain, distill=replace(plain.distill, frozen=adapting.frozen(config.adapt)))
                part = Part(arm, folder, plain)
                scored = self._kept(part) or self.train(part, {}, config, **{"ema": None, **config.fit})
                config = config.fitted(folder)
                self.teachers[name] = build_teacher(self.recipe, name, config)
            if scored is None:
                with problems_of(self.recipe.teacher_path(name), config):
                    scored = self.score_teacher(arm, self.teachers[name])
            arms += [] if scored is None else [scored]
        self.teachers = {name: self.teachers[name] for name in configs}
        return arms

    def _load(self, name: str, config: TeacherConfig) -> Teacher:
        load = partial(build_teacher, self.recipe, name, config)
        return load() if self.sharing is None else self.sharing.loaded(name, load)

    @staticmethod
    def _plain(recipe: Recipe) -> Recipe:
        """The recipe in one part, in which everything is trained."""
        return replace(recipe, phases=None, distill=replace(recipe.distill, frozen=None))

    def parts(self, recipe: Recipe, name: str, folder: Path) -> list[Part]:
        """The runs of an arm, one after another."""
        total = recipe.training.get("max_steps", -1)
        if recipe.phases and total < 1:  # counted in epochs of the recipe's own data and batches
            args = training_args(recipe, folder, **SCORE_ONLY)
            whole = Part(name, folder, self._plain(recipe))
            trainer = self._trainer(whole, build_student(self.recipe, self.task), self.teachers, args)
            total = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
        return parts_of(recipe, name, folder, total)

    def open_phases(self) -> None:
        """Opens the data of the phases that have their own, so that all their problems are told before training."""
        for phase in self.recipe.phases or ():
            part = part_of(self.recipe, phase)
            if part.data != self.recipe.data:
                with problems_in(phase):
                    self._opened[repr((part.data, part.labelled))] = open_phase(part, self.task, self.data)

    def rehearse(self, parts: Sequence[Part]) -> None:
        """Builds the trainer of each later phase, so that what is wrong with it is told before the first begins."""
        for part in parts[1:]:
            if part.phase is not None and not (part.folder / ARM_FILE).is_file():
                args = training_args(part.recipe, part.folder, **part.settings, **SCORE_ONLY)
                with problems_in(part.phase):
                    self._trainer(part, build_student(self.recipe, self.task), self.teachers, args)

    def train_arm(self, parts: Sequence[Part], teachers: Mapping[str, Teacher]) -> Arm:
        """Trains the parts of an arm; the record of the last one is that of the arm."""
        done = self._kept(parts[-1])
        if done is not None:
            return done
        arms: list[Arm] = []
        for part in parts:
            part.arms = list(arms)
            arms.append((None if part.last else self._kept(part)) or self.train(part, teachers))
        return arms[-1]

    def train(
        self, part: Part, teachers: Mapping[str, Teacher], taught: TeacherConfig | None = None, **overrides: Any
    ) -> Arm:
        """Trains one part of an arm; with `taught` it is a teacher that is trained."""
        name, folder = part.name, part.folder
        if folder != Path(self.recipe.output_dir):
            overrides["push_to_hub"] = False  # the run's repository is for its student
        args, meter = training_args(part.recipe, folder, **part.settings, **overrides), CostMeter()
        part.charge(meter, self._data_of(part))
        # Every arm starts from the same weights and sees the same images.
        model = build_student(self.recipe, self.task, None if taught is None else adapting.untrained(taught), name)
        inherited = [] if taught is not None else inherit_parts(self.recipe, model, self.teachers, name)
        merge = adapting.with_adapters(model, None if taught is None else taught.adapt)
        trainer = self._trainer(part, model, teachers, args, inherited)
        part.go_on(trainer.distiller)
        checkpoint = self._checkpoint(part, args)
        stopwatch = self._watch(trainer, part, checkpoint, meter)
        if self.sharing is not None:
            self.sharing.join(trainer, meter)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (KeyboardInterrupt, SystemExit) as error:
            if trainer.graceful.stopped:
                raise Stopped(folder) from error
            raise KeyboardInterrupt from error
        except (Unusable, WrongLabels) as error:
            expect_change(Path(self.recipe.output_dir), error.problems)
            raise
        seconds = stopwatch.seconds
        merge()
        trainer.save_model(str(folder), _internal_call=True)  # pushed at the end, when there are scores
        scores = self._scores(trainer, name) if part.scored else {}
        trainer.accelerator.wait_for_everyone()  # until what the next part begins with is written
        steps = trainer.state.global_step
        arm = Arm(name, str(folder), scores, model.num_parameters(), steps, round(seconds, 1), inherited, meter.cost)
        arm.prepaid, arm.working, arm.cache = meter.prepaid, trainer.working.facts(), trainer.cache_facts()
        arm.ema = trainer.ema_facts()
        if args.process_index == 0:
            trainer.state.save_to_json(str(folder / STATE_FILE))
            arm = part.ended(arm)
            write_details(folder, self.details.get(name, {}))
            write_arm(folder, arm, _taps(trainer))
        return arm

    def _watch(self, trainer: CanKDTrainer, part: Part, checkpoint: str | None, meter: CostMeter) -> Stopwatch:
        """Says which part begins, and has its time, its cost and what is left of the run measured."""
        line, start = self.clock.begin(part.title), f", goes on from {checkpoint}" if checkpoint else ""
        if trainer.args.process_index == 0:
            logger.warning("%s -> %s%s", line, part.folder, start)
            if images := trainer.images_told():
                logger.warning("%s", images)
        stopwatch = Stopwatch()
        for callback in (stopwatch, meter, self.clock):
            trainer.add_callback(callback)
        trainer.working.says_the_end = not part.last  # that of the arm is in the report of the run
        if trainer.progress is not None and len(self.clock.parts) > 1:
            trainer.progress.whole = self.clock.left
        return stopwatch

    def score_teacher(self, name: str, teacher: Teacher) -> Arm | None:
        """The teacher's own score, with its own normalisation; None if it is not a model of this task."""
        folder, found = teacher.config.model, cast(PreTrainedModel, teacher.model)
        if folder is None or self.task.needs_teacher_in_evaluation or not self.task.accepts(found):
            return None
        model = self.task.load(folder, teacher.config.revision)
        if (why := self.task.why_not_scored(model)) is not None:
            logger.warning("%s: %s; it is not scored", name, why)
            return None
        args = training_args(self.recipe, Path(self.recipe.output_dir), **SCORE_ONLY)
        trainer = CanKDTrainer(model, None, args, task=self.task)
        dataset = self.scored_set
        mean, std = list(teacher.stats.mean), list(teacher.stats.std)
        self.stats[name] = mean, std
        if dataset is not None and (mean, std) != (self.recipe.data.image_mean, self.recipe.data.image_std):
            config = replace(self.recipe.data, image_mean=mean, image_std=std, check="none")
            role = "test" if self.split == "test" else "eval"
            data = type(self.task).from_data(config, splits=(role,))[1]
            dataset = data.test if role == "test" else data.eval
        return Arm(name, folder, self._scores(trainer, name, dataset), model.num_parameters())

    def picture(self, report: Report) -> None:
        """Draws the answers of all models, and writes the page of the run."""
        if self.scored_set is None:
            return
        from cankd_hf.runs.page import Page, write_page  # matplotlib: only where it draws

        device = PartialState().device  # new arguments would reset the state that other students still train with
        there = [arm for arm in reversed(report.arms) if Path(arm.folder).is_dir()]
        models: dict[str, Any] = {arm.name: self.task.load(arm.folder).to(device) for arm in there}  # type: ignore[arg-type]
        self.task.picture(self.scored_set, models, Path(report.output_dir) / PICTURE_FILE, self.recipe.data)
        details = {arm.name: self.details.get(arm.name) or read_details(Path(arm.folder)) for arm in report.arms}
        write_page(report, Page(self.recipe, self.task, self.scored_set, details, models, self.stats))

    def _scores(self, trainer: CanKDTrainer, name: str, dataset: Any = None) -> dict[str, float]:
        dataset = self.scored_set if dataset is None else dataset
        if dataset is None:
            return {}
        with trainer.keeping_details() as details:
            metrics = trainer.evaluate(dataset, metric_key_prefix=self.split)
        self.details[name] = details_of(self.task, details, self.split, dataset)
        prefix = f"{self.split}_"
        return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}

    def _trainer(
        self,
        part: Part,
        model: PreTrainedModel,
        teachers: Mapping[str, Teacher],
        args: CanKDConfig,
        inherited: Sequence[str] = (),
    ) -> CanKDTrainer:
        recipe, data, text = part.recipe, self._data_of(part), recipe_to_yaml(self.recipe)
        trainer = make_trainer(recipe, self.task, data, model, part.taught_by(teachers), args, inherited, text)
        trainer.keep_connectors = not part.last
        return trainer

    def _data_of(self, part: Part) -> TaskData:
        return self._opened.get(repr((part.recipe.data, part.recipe.labelled)), self.data)

    def _kept(self, part: Part) -> Arm | None:
        """The record of a part that was finished before."""
        done = finished_arm(part.folder, part.name)
        if done is not None:
            unused = f"; --resume {self.resume} is not used" if self._resumes(part) else ""
            kept = "%s: finished before, kept (%s); --restart trains it again%s"
            logger.warning(kept, part.name, part.folder, unused)
        return done

    def _resumes(self, part: Part) -> bool:
        """Whether `--resume` is for this part: of the last arm, and where it has phases the one that it lies in."""
        last = part.name.startswith("student") and not part.name.startswith(ALONE)
        return self.resume is not None and last and part.holds(Path(self.resume))

    def _checkpoint(self, part: Part, args: CanKDConfig) -> str | None:
        if self._resumes(part):
            return self.resume
        found = chosen(part.folder, args.process_index == 0)
        return None if found is None else str(found)


def _taps(trainer: CanKDTrainer) -> list[dict[str, Any]]:
    return [vars(level) for level in trainer.distiller.levels]
