"""`students:` of a recipe: a run for each student, all in one process, that share every pass of a teacher."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cankd_hf.config.recipe import Recipe
from cankd_hf.errors import InputError, together
from cankd_hf.runs.build import training_args
from cankd_hf.runs.record import Report
from cankd_hf.runs.run import Stopped, run
from cankd_hf.runs.session import check_session
from cankd_hf.runs.sharing import Answer, Process, Sharing, Turns
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.callbacks import GracefulStopCallback


class _StopAll(GracefulStopCallback):
    """Asks every student's training to stop."""

    def __init__(self, all_of_them: Sequence[Sharing]) -> None:
        super().__init__()
        self.all_of_them = all_of_them

    def _ask(self, signum: int, frame: Any) -> None:
        super()._ask(signum, frame)
        for one in self.all_of_them:
            if one.graceful is not None:
                one.graceful.ask(signum)


@contextmanager
def _named(names: Collection[str]) -> Iterator[None]:
    """Inside, what the threads of these names log begins with their name."""
    before: Any = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = before(*args, **kwargs)
        if record.threadName in names:
            record.msg = f"{record.threadName}: {record.msg}"
        return record

    logging.setLogRecordFactory(made)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def run_all(
    recipe: Recipe, restart: bool = False, resume: str | None = None, notes: Sequence[str] = ()
) -> list[Report]:
    """Runs a recipe, see `run`; with `students` each of them, in `output_dir/NAME`.

    Raises:
        InputError: for bad input; what is wrong with one student does not stop the others.
        Stopped: after Ctrl-C, with a checkpoint of each student saved.
    """
    if not recipe.students:
        return [run(recipe, restart, resume, notes)]
    recipes = {name: recipe.of_student(name) for name in recipe.students}
    if resume is not None:
        raise InputError("--resume: names the checkpoint of one student; leave it out, each goes on from its newest")
    together(*(partial(check_session, one, restart) for one in recipes.values()))
    if training_args(recipe, Path(recipe.output_dir)).world_size > 1:
        raise InputError("students: take turns in one process, got several; train each in a run of its own")
    turns, answers, teachers = Turns(list(recipes)), dict[str, Answer](), dict[str, Teacher]()
    shared = {name: Sharing(name, turns, answers, teachers) for name in recipes}
    ended: dict[str, Report | BaseException] = {}

    def train(name: str) -> None:
        try:
            with turns.taken(name):
                told = notes if name == next(iter(recipes)) else ()
                ended[name] = run(recipes[name], restart, notes=told, sharing=shared[name])
        except BaseException as error:  # told below, by the thread that waits
            ended[name] = error

    before = Process()
    threads = [threading.Thread(target=train, args=(name,), name=name, daemon=True) for name in recipes]
    with _StopAll(list(shared.values())).listening(), _named(recipes):
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # signals reach this thread in between
    before.restore()
    return _reports(ended, recipe)


def _of(name: str, problem: str) -> str:
    """A problem of one student, with the keys that it has in the recipe of all."""
    place = f"students.{name}"
    return problem.replace("student.", f"{place}.") if problem.startswith("student.") else f"{place}: {problem}"


def _reports(ended: dict[str, Report | BaseException], recipe: Recipe) -> list[Report]:
    """The reports in the order of the recipe; raises what ended a run instead, errors of input all together."""
    assert recipe.students is not None
    found = [ended[name] for name in recipe.students]
    others = [one for one in found if isinstance(one, BaseException) and not isinstance(one, InputError | Stopped)]
    if others:
        raise others[0]
    wrong = {name: one for name, one in ended.items() if isinstance(one, InputError)}
    if wrong:
        raise InputError([_of(name, said) for name, error in wrong.items() for said in error.problems])
    if any(isinstance(one, Stopped) for one in found):
        raise Stopped(Path(recipe.output_dir))
    return [one for one in found if isinstance(one, Report)]
