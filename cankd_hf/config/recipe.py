"""A whole recipe: its sections, the rules between them, and its YAML form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, replace
from itertools import zip_longest
from typing import Annotated, Any

from annotated_types import Ge, Le, Len

from cankd_hf.config import declared
from cankd_hf.config.advice import nearest, not_one_of
from cankd_hf.config.data import DataConfig, check_mixed, labelled_in
from cankd_hf.config.distill import DistillConfig, LossTerm
from cankd_hf.config.hub import HubConfig
from cankd_hf.config.phases import (
    Phase,
    Schedule,
    phase_problems,
    phases_of,
    teachers_of,
    without_teacher,
    without_terms_of,
)
from cankd_hf.config.plain_yaml import dump_yaml, parse_yaml
from cankd_hf.config.schema import Problems, Section, plain
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.config.training import contradictions
from cankd_hf.errors import InputError
from cankd_hf.names import RECIPE_FILE

LEARNING_RATE = 5e-5  # of `transformers.TrainingArguments`
# Keys that may differ between two calls of the same run.
_HARMLESS = {
    "baseline",
    "data.cache",
    "data.check",
    "data.on_error",  # a broken file that the checks did not look at may be met later
    "teacher.cache.folder",
    "teacher.cache.repo",
    "output_dir",  # the saved recipe lies in it: the folder was moved, or is named in another way
    "training.dataloader_num_workers",
    "training.disable_tqdm",
    "training.hub_always_push",
    "training.hub_model_id",
    "training.hub_private_repo",
    "training.hub_revision",
    "training.hub_strategy",
    "training.log_figures_steps",
    "training.prediction_images",
    "training.max_nonfinite_steps",
    "training.push_to_hub",
    "training.report_to",
    "training.run_name",
}


@dataclass(kw_only=True)
class Recipe(Section):
    """A recipe with all its sections.

    Attributes:
        task: name of the task, in `cankd_hf.tasks.TASKS`.
        seed: seed of initial weights (those of random teachers too), data order and augmentation; `training.data_seed`
            gives the last two another one.
        output_dir: folder of the checkpoints and results.
        data: the data set and its augmentation.
        student: the model to train.
        students: several students by name instead of `student`, `{small: {...}, ...}`: a run for each in
            `output_dir/NAME`, all in one process, in which each pass of a teacher serves all of them.
        teacher: the frozen model to learn from; null trains the student alone.
        teachers: several teachers by name instead of `teacher`, `{dino: {model: ...}, ...}`; each term names its one.
            One that is null (`teachers.dino=null`) is left out, with the terms that name it.
        distill: the distillation losses and their weights.
        baseline: also train the student alone, with the same steps and initial weights, and print the table.
        training: settings of `transformers.TrainingArguments` and of `cankd_hf.CanKDConfig`.
        phases: parts of the run one after another, each with its share of the steps and its changes; null: one part.
        schedule: phases by one word: `joint`, `features_then_task`, `warm_start`, `frozen_encoder`, `polish` or
            `recommended`.
        hub: where the student is pushed; with null only if `training.push_to_hub` is set.
    """

    task: str = "segmentation"
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 42
    output_dir: str
    data: DataConfig
    student: StudentConfig
    students: Annotated[dict[str, StudentConfig], Len(1)] | None = None
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig | None] | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)
    baseline: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    phases: list[Phase] | None = None
    schedule: Schedule | None = None
    hub: HubConfig | None = None

    def problems(self) -> Iterator[tuple[str, str]]:
        """Problems beyond types and ranges: an unknown task, an empty output_dir."""
        known = declared.names("cankd_hf.tasks", "TASKS")
        if self.task not in known:
            yield "task", not_one_of(self.task, known)
        if not self.output_dir.strip():
            yield "output_dir", "expected a folder, got an empty name; name one, such as runs/first"
        if self.phases is not None and self.schedule is not None:
            yield "schedule", "stands for phases, and phases are given too; leave one of them out"
        if self.phases is not None:
            yield from phase_problems(self.phases)

    def named_students(self) -> dict[str, StudentConfig]:
        """The students by their keys in the recipe: `student`, or `students.NAME`."""
        return {f"students.{name}": one for name, one in (self.students or {}).items()} or {"student": self.student}

    def of_student(self, name: str) -> Recipe:
        """The recipe of the run of one of `students`."""
        assert self.students is not None
        return replace(self, student=self.students[name], students=None, output_dir=f"{self.output_dir}/{name}")

    @property
    def labelled(self) -> bool:
        """Whether any part of it has a task loss, which reads labels."""
        weight = self.distill.task_weight
        return any(phase.reads_labels(weight) for phase in self.phases) if self.phases else weight > 0

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by name; the one of `teacher:` is called "teacher"."""
        several = {name: teacher for name, teacher in (self.teachers or {}).items() if teacher is not None}
        return several if self.teacher is None else {"teacher": self.teacher}

    def with_teachers(self, teachers: Mapping[str, TeacherConfig]) -> Recipe:
        """The recipe with these teachers, by the names of its own."""
        if self.teacher is not None:
            return replace(self, teacher=teachers["teacher"])
        return replace(self, teachers=dict(teachers) or None)

    def left_out(self) -> set[str]:
        """The names of teachers that are null."""
        return {name for name, teacher in (self.teachers or {}).items() if teacher is None}

    def teacher_path(self, name: str) -> str:
        """The key of a teacher in the recipe: `teacher` or `teachers.NAME`."""
        return "teacher" if self.teacher is not None else f"teachers.{name}"

    def resolved(self) -> Recipe:
        """The recipe as it is run: without teachers that are null and their terms, without any teacher also without
        baseline; phases stand for words."""
        if left_out := self.left_out():
            return _without(self, left_out).resolved()
        phases = self.phases
        if self.schedule is not None:
            rate = self.training.get("learning_rate", LEARNING_RATE)
            guarded = self.distill.guard is not None
            phases = phases_of(self.schedule, self.data, rate, self.distill.task_weight, guarded)
        if self.named_teachers():
            return replace(self, phases=phases, schedule=None)
        phases = None if phases is None else without_teacher(phases, self.distill.task_weight)
        alone = replace(self.distill, terms=[])
        return replace(self, distill=alone, baseline=False, phases=phases, schedule=None)


def _without(recipe: Recipe, names: Container[str | None]) -> Recipe:
    """The recipe without some of its teachers, and without the terms that name them."""
    teachers = {name: teacher for name, teacher in (recipe.teachers or {}).items() if name not in names}
    terms = [term for term in recipe.distill.terms if term.teacher not in names]
    phases = None if recipe.phases is None else [without_terms_of(phase, names) for phase in recipe.phases]
    return replace(recipe, teachers=teachers or None, distill=replace(recipe.distill, terms=terms), phases=phases)


def check_together(problems: Problems, recipe: Recipe) -> None:
    """Adds problems that involve several sections, if these could be read."""
    if problems.usable("teacher", "teachers"):
        terms = [
            (f"distill.terms.{index}", term)
            for index, term in enumerate(recipe.distill.terms)
            if problems.usable(f"distill.terms.{index}.name", f"distill.terms.{index}.loss")
        ]
        for path, message in [
            *_teacher_names(recipe),
            *_student_names(recipe),
            *_term_names(recipe, terms),
            *_nothing_to_learn(recipe),
        ]:
            problems.say(path, message)
    for path, message in _training_together(recipe):
        if problems.usable(*(f"training.{key}" for key in recipe.training)):
            problems.say(path, message)
    for path, message in _caches(recipe) if problems.usable("teacher", "teachers") else ():
        problems.say(path, message)
    steps = recipe.training.get("max_steps", -1)
    if problems.usable("data", "training", "distill", "teacher", "teachers"):
        for key, text in _batches(recipe):
            problems.say(key, text)
    streamed = [key for key in ("streaming", "unlabelled_streaming") if getattr(recipe.data, key)]
    if streamed and problems.usable("training.max_steps") and not steps > 0:
        problems.say(
            f"data.{streamed[0]}",
            "a stream has no known length; set training.max_steps to the number of optimizer steps to take",
        )


def _batches(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Batches of training that cannot be shared out among labelled and unlabelled images, or are too small to mix."""
    data, batch = recipe.data, recipe.training.get("per_device_train_batch_size", 8)
    taught = bool(recipe.named_teachers()) and any(term.counts for term in recipe.distill.terms)
    parts = {"labelled": batch}
    try:
        if data.unlabelled is not None and taught and recipe.distill.task_weight > 0:
            own = labelled_in(batch, data.unlabelled_ratio)
            parts = {"unlabelled": batch - own, **({"labelled": own} if data.strong.images == "all" else {})}
        elif data.strong.images != "all":
            return
        # where it is left open the task decides, and the trainer looks
        for name, images in parts.items() if data.strong.cutmix and data.strong.images != "none" else ():
            check_mixed(name, images)
    except InputError as error:
        for problem in error.problems:
            key, _, message = problem.partition(": ")
            yield key, message


def _training_together(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Settings of `training:`, and of `fit` on top of them, that contradict each other or the data."""
    told = set()
    fits = {recipe.teacher_path(name): teacher.fit for name, teacher in recipe.named_teachers().items()}
    for place, changes in {"training": {}, **{f"{path}.fit": fit for path, fit in fits.items() if fit}}.items():
        settings = {**recipe.training, **changes}
        found = list(contradictions(settings))
        strategy = settings.get("eval_strategy", "no")
        # A run without labels holds out a part of the training images instead.
        if strategy != "no" and recipe.data.eval_split is None and recipe.distill.task_weight > 0:
            message = f"{strategy} needs a validation split, and data.eval_split names none; name one, or set "
            found.append(("eval_strategy", f'{message}training.eval_strategy: "no"'))
        for key, message in found:
            if (key, message) not in told:
                told.add((key, message))
                yield f"{place}.{key}", message


def _caches(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Stored teachers whose pictures would have to be two kinds at once, or cannot repeat."""
    caches = {recipe.teacher_path(name): one.cache for name, one in recipe.named_teachers().items() if one.cache}
    first = next(iter(caches.items()), None)
    for path, cache in caches.items():
        if first is not None and (cache.views, cache.seed, cache.whole) != (
            first[1].views,
            first[1].seed,
            first[1].whole,
        ):
            yield (
                f"{path}.cache",
                f"expected the views, seed and whole of {first[0]}.cache ({first[1].views}, {first[1].seed}, "
                f"{first[1].whole}), as all teachers see the same pictures, got {cache.views}, {cache.seed}, "
                f"{cache.whole}; write the same",
            )
        if recipe.data.streaming:
            yield f"{path}.cache", "a stream does not repeat its pictures; set data.streaming: false, or leave it out"


def _teacher_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.teacher is not None and recipe.teachers is not None:
        yield "teachers", "expected teacher or teachers, got both; write one as `teacher:`, several as `teachers:`"
    for name in recipe.teachers or {}:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            yield f"teachers.{name}", f"expected a letter or _, then letters, digits, _ and -, got {name!r}; rename it"
    known = recipe.named_teachers()
    asked = {term.teacher for term in recipe.distill.terms}.union(*map(teachers_of, recipe.phases or ()))
    for name in sorted(recipe.left_out() - asked) if known else ():
        fix = nearest(name, known, f"known: {', '.join(known)}")
        yield f"teachers.{name}", f"null leaves out a teacher and the terms that name it, and none does; {fix}"
    count = len(known)
    for path, student in recipe.named_students().items():
        parts = student.inherit
        if parts and count == 0:
            yield f"{path}.inherit", "copies parts of the teacher, but there is none; give a teacher or leave it out"
        elif parts and count > 1:
            yield f"{path}.inherit", f"expected one teacher to copy {parts} from, got {count}; leave it out"


def _student_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.students is None:
        return
    if recipe.student != next(iter(recipe.students.values())):
        yield "students", "expected student or students, got both; write one as `student:`, several as `students:`"
    for name in recipe.students:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
            yield f"students.{name}", f"expected a letter or _, then letters, digits, _ and -, got {name!r}; rename it"
    if not recipe.named_teachers():
        yield "students", "share the passes of a teacher, and there is none; give one, or train each in its own run"
    for name, teacher in recipe.named_teachers().items():
        if teacher.fit is not None:
            told = "would fit a teacher for each of students; fit it in a run of its own, and name its folder as model"
            yield f"{recipe.teacher_path(name)}.fit", told
    if recipe.hub is not None or recipe.training.get("push_to_hub"):
        yield "students", "would all be pushed to one repository; push each afterwards: cankd push output_dir/NAME"


def _term_names(recipe: Recipe, terms: list[tuple[str, LossTerm]]) -> Iterator[tuple[str, str]]:
    known, labels = recipe.named_teachers(), set()
    if recipe.teacher is not None and recipe.teachers is not None:
        return  # reported already; which of them a term means is open
    for path, term in terms:
        if term.label in labels:
            yield path, f"a second term called {term.label!r}; give it another `name`"
        labels.add(term.label)
        if known and term.teacher is not None and term.teacher not in {*known, *recipe.left_out()}:
            yield f"{path}.teacher", not_one_of(term.teacher, known)
        elif len(known) > 1 and term.teacher is None:
            yield f"{path}.teacher", f"missing; name the teacher to learn from: {' or '.join(known)}"


def _nothing_to_learn(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.distill.task_weight != 0:
        return
    recipe = recipe.resolved()
    if not any(term.weight not in (0, []) for term in recipe.distill.terms):
        what = "distill.terms with a weight above 0" if recipe.named_teachers() else "a teacher"
        yield "distill.task_weight", f"0 leaves nothing to learn without {what}; give it, or set task_weight to 1"
    elif all(term.fade is not None and term.fade[1] < 1 for term in recipe.distill.terms if term.counts):
        yield "distill.task_weight", "0 leaves nothing to learn once all terms have faded; let one end at 1"
    elif all(teacher.every > 1 for teacher in recipe.named_teachers().values()):
        yield "distill.task_weight", "0 leaves nothing to learn in steps without a teacher; set its `every` to 1"
    elif recipe.baseline:
        yield "baseline", "a student alone learns nothing with distill.task_weight: 0; set baseline: false"
    for name, teacher in recipe.named_teachers().items():
        if teacher.fit is not None:
            yield (
                f"{recipe.teacher_path(name)}.{'fit' if teacher.adapt is None else 'adapt'}",
                "fits the teacher to the task, but distill.task_weight: 0 reads no labels; remove one",
            )


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, from which `load_recipe` makes an equal recipe. It never contains a token."""
    return dump_yaml(dataclasses.asdict(recipe))


def recipe_differences(saved: str, recipe: Recipe) -> list[str]:
    """Differences between a saved recipe and this one that affect training: `training.max_steps: 100 -> 200`.

    `saved` is YAML as `recipe_to_yaml` wrote it, perhaps of an earlier version: a key that it lacks had its default.
    """
    try:
        texts = (saved, recipe_to_yaml(recipe))
        before, now = (settings_that_count(_completed(parse_yaml(text, RECIPE_FILE)[0], recipe)) for text in texts)
    except InputError as error:
        return [f"its recipe cannot be read: {error}"]
    keys = [*before, *(key for key in now if key not in before)]
    return [
        f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _completed(saved: Any, like: Any) -> Any:
    """Plain data with the defaults of the keys that it lacks, at any depth, where `like` has a section there."""
    if isinstance(saved, dict) and isinstance(like, dict):
        return {key: _completed(value, like.get(key)) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(like, list):
        return [_completed(value, one) for value, one in zip_longest(saved, like[: len(saved)])]
    if not (isinstance(saved, dict) and isinstance(like, Section)):
        return {} if saved is None and isinstance(like, Recipe) else saved
    known = {key: _completed(value, getattr(like, key, None)) for key, value in saved.items()}
    for one in dataclasses.fields(like):  # type: ignore[arg-type]
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name not in saved and default is not MISSING:
            known[one.name] = plain(default)
    return known


def settings_that_count(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, as plain data, that affect training: value by dotted path."""
    found = flat(recipe)
    return {key: value for key, value in found.items() if not _is_harmless(key) and key.split(".")[0] != "hub"}


def _is_harmless(key: str) -> bool:
    return key in _HARMLESS or re.sub(r"^teachers\.[^.]+", "teacher", key) in _HARMLESS


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Plain data as values by dotted path; an empty mapping or list is a value."""
    if not isinstance(value, dict | list) or not value:
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        inner: leaf for key, item in items for inner, leaf in flat(item, f"{path}.{key}" if path else str(key)).items()
    }
