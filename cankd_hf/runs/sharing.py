"""What several runs in one process share: turns, in which one works at a time, and every pass of a teacher.

A run hands over when it needs an answer of a teacher that nobody has asked for yet, so that all come to the same batch
one after another. An answer belongs to its picture: it is used again only for pixels that are bit-equal, and a student
that sees others is taught by a pass of its own. Random numbers and what accelerate keeps of the process are exchanged
with the turn, so that each run computes what it computes alone.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.state import GradientState
from torch import Tensor

from cankd_hf.data.common.batch import TEACHER_VIEW, Batch
from cankd_hf.teachers.source import TeacherSource
from cankd_hf.teachers.teacher import Teacher, TeacherOutput
from cankd_hf.training.callbacks import GracefulStopCallback
from cankd_hf.training.monitoring.cost import CostMeter
from cankd_hf.training.trainer import CanKDTrainer


class Process:
    """What a run reads and changes of the process: random states, and what accelerate knows of the present loader."""

    def __init__(self) -> None:
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._device = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        shared = GradientState._shared_state
        self._loaders = {name: list(one) if isinstance(one, list) else one for name, one in shared.items()}

    def restore(self) -> None:
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        if self._device:
            torch.cuda.set_rng_state_all(self._device)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self._loaders)


class Turns:
    """Lets one thread of several work at a time, in the order of their names."""

    def __init__(self, names: Sequence[str]) -> None:
        self._ring = list(names)
        self._now = self._ring[0]
        self._changed = threading.Condition()
        self._start = Process()

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """Waits for the first turn of a thread; afterwards it has no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._now == name)
        self._start.restore()
        try:
            yield
        finally:
            with self._changed:
                self._now = self._next(name)
                self._ring.remove(name)
                self._changed.notify_all()

    def pass_on(self, name: str) -> None:
        """Lets all others have their turn."""
        if self._next(name) == name:
            return
        kept = Process()
        with self._changed:
            self._now = self._next(name)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._now == name)
        kept.restore()

    def _next(self, name: str) -> str:
        return self._ring[(self._ring.index(name) + 1) % len(self._ring)]


@dataclass
class Answer:
    """A teacher's output for a batch, the pictures that it belongs to, and the seconds that it took by clock."""

    pictures: Tensor
    output: TeacherOutput
    seconds: dict[str, float]


@dataclass
class Sharing:
    """The part of one student's run in what several share.

    Args:
        name: of the student.
        turns: of all students.
        answers: the last answer of each teacher.
        teachers: those that are loaded.
    """

    name: str
    turns: Turns
    answers: dict[str, Answer]
    teachers: dict[str, Teacher]
    passes: int = 0  # of teachers, made for this student
    meter: CostMeter | None = None
    graceful: GracefulStopCallback | None = field(default=None, repr=False)

    def loaded(self, name: str, load: Callable[[], Teacher]) -> Teacher:
        """The teacher of this name, which the first run loads for all."""
        if name not in self.teachers:
            self.teachers[name] = load()
        return self.teachers[name]

    def join(self, trainer: CanKDTrainer, meter: CostMeter) -> None:
        """Called with each trainer of the run, before it trains."""
        self.meter, self.graceful = meter, trainer.graceful
        trainer.source = SharedTeachers(trainer.source, self)


class SharedTeachers:
    """A `TeacherSource` that asks another one only for what no other student has asked it for.

    A pass is charged in full to every student that learns from it, and a turn of another student to none but that.
    """

    def __init__(self, source: TeacherSource, sharing: Sharing) -> None:
        self.source, self.sharing = source, sharing

    def __call__(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, TeacherOutput]:
        """See `TeacherSource`."""
        if names is None or not torch.is_grad_enabled():  # held-out images, which are few
            return self.source(batch, names)
        return {name: self._answer(batch, name) for name in names}

    def _answer(self, batch: Batch, name: str) -> TeacherOutput:
        meter = self.sharing.meter
        assert meter is not None
        pictures = batch.get(TEACHER_VIEW, batch["pixel_values"])
        if not self._known(pictures, name):
            with meter.free():
                self.sharing.turns.pass_on(self.sharing.name)
        if self._known(pictures, name):
            found = self.sharing.answers[name]
            meter.charge(found.seconds)
            return found.output
        self.sharing.passes += 1
        before = meter.clocks()
        output = self.source(batch, [name])[name]
        seconds = {clock: now - before[clock] for clock, now in meter.clocks().items()}
        self.sharing.answers[name] = Answer(pictures, output, seconds)
        return output

    def _known(self, pictures: Tensor, name: str) -> bool:
        found = self.sharing.answers.get(name)
        return found is not None and (found.pictures is pictures or torch.equal(found.pictures, pictures))
