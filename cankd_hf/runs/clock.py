"""The parts of a run, how long each takes by what was measured so far, and how much is left of all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from cankd_hf.config.phases import steps_of
from cankd_hf.config.recipe import Recipe
from cankd_hf.durations import duration
from cankd_hf.names import ALONE, DISTILLED, STUDENT, TEACHER
from cankd_hf.runs.build import training_args
from cankd_hf.tasks import TaskData
from cankd_hf.training.arguments import CanKDConfig

# What an image costs in an evaluation, as a part of what it costs in training, until one was measured: there is no
# backward pass, and no teacher.
FORWARD = 0.4


@dataclass
class Stretch:
    """One part of a run: a teacher, the student alone, the student, or a phase of these.

    Attributes:
        title: of the part, as in messages.
        steps: of its training; 0 where it is not known.
        evaluations: while it trains.
        seconds: of a step, without evaluations, as measured; None where it was not.
    """

    title: str
    steps: int
    evaluations: int
    seconds: float | None = None


class RunClock(TrainerCallback):
    """Tells at the start of each part which it is, and at any time how long the whole run still takes.

    The time is what was measured: of this part its own steps, of a part that has not begun the slowest steps so far,
    and of evaluations and the scoring at the end of each part the images of those before.

    Args:
        parts: of the run, in their order.
        evaluated: number of images of an evaluation.
        scored: number of images that the student of a part is scored on.
    """

    def __init__(self, parts: Sequence[Stretch], evaluated: int, scored: int) -> None:
        self.parts = list(parts)
        self.evaluated, self.scored = evaluated, scored
        self.now = 0  # index of the part that runs
        self._first: tuple[float, int] | None = None  # when the first step of this part ended, and its number
        self._step, self._done = 0, 0  # steps, and evaluations since the first
        self._batch = 1
        self._mark: float | None = None  # since an evaluation runs
        self._paused = 0.0  # in evaluations since the first step
        self._images, self._seconds = 0, 0.0  # evaluated so far, in all parts

    def begin(self, title: str) -> str:
        """Takes the part of this title as begun. Returns a line about it."""
        known = [index for index, part in enumerate(self.parts) if part.title == title]
        self.now = known[0] if known else self.now
        self._first, self._step, self._done, self._paused = None, 0, 0, 0.0
        part = self.parts[self.now]
        said = f"{self.now + 1} of {len(self.parts)}: {title}" if len(self.parts) > 1 else title
        said += f", {part.steps} {'step' if part.steps == 1 else 'steps'}" if part.steps else ""
        if (left := self._of_part(self.now)) is None:
            return said
        whole = self.left()
        after = (
            "" if whole is None or self.now == len(self.parts) - 1 else f", {duration(whole)} to the end of the run"
        )
        return f"{said}, about {duration(left)}{after}"

    def left(self) -> float | None:
        """Seconds that are left of the whole run; None before anything was measured."""
        found = [self._of_part(index) for index in range(self.now, len(self.parts))]
        return None if None in found else sum(value for value in found if value is not None)

    def _of_part(self, index: int) -> float | None:
        """Seconds that are left of this part or a later one."""
        part, current = self.parts[index], index == self.now
        step = (
            part.seconds
            if part.seconds is not None
            else max((other.seconds for other in self.parts if other.seconds is not None), default=None)
        )
        if step is None or not part.steps:
            return None
        image = self._seconds / self._images if self._images else FORWARD * step / self._batch
        steps, evaluations = (self._step, self._done) if current else (0, 0)
        images = max(0, part.evaluations - evaluations) * self.evaluated + self.scored
        return max(0, part.steps - steps) * step + images * image

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        part, self._step, self._mark = self.parts[self.now], state.global_step, None
        self._batch = max(1, args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
        self.parts[self.now] = replace(part, steps=state.max_steps, evaluations=evaluations_of(args, state.max_steps))
        every = max(1, state.max_steps // max(1, self.parts[self.now].evaluations))
        self._done = state.global_step // every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step = state.global_step
        if self._first is None:  # a first step compiles, and starts loading processes
            self._first, self._paused = (time.perf_counter(), self._step), 0.0
        elif (steps := self._step - self._first[1]) > 0:
            self.parts[self.now].seconds = (time.perf_counter() - self._first[0] - self._paused) / steps

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._mark is None:
            self._mark = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        metrics = _.get("metrics") or {}
        seconds = next((value for key, value in metrics.items() if key.endswith("_runtime")), None)
        scored = any(not key.startswith("eval_") and key.endswith("_runtime") for key in metrics)
        if self._mark is None or seconds is None:
            return
        self._paused += time.perf_counter() - self._mark if not scored else 0.0
        self._images += self.scored if scored else self.evaluated
        self._seconds += seconds
        self._done += not scored
        self._mark = None


def evaluations_of(args: TrainingArguments, steps: int) -> int:
    """How often a training of this many steps is evaluated."""
    strategy = IntervalStrategy(args.eval_strategy)
    if strategy == IntervalStrategy.STEPS:
        every = args.eval_steps or args.logging_steps
        return int(steps // (every if every >= 1 else max(1, math.ceil(steps * every))))
    return math.ceil(args.num_train_epochs) if strategy == IntervalStrategy.EPOCH else 0


def run_clock(recipe: Recipe, data: TaskData, scored: Any) -> RunClock:
    """The clock of a run, with all its parts.

    Args:
        recipe: of the run.
        data: of the run.
        scored: the set that the student is scored on, or None.
    """
    out, images, parts = Path(recipe.output_dir), _length(data.train), list[Stretch]()
    configs = recipe.named_teachers()
    for name, config in configs.items():
        if config.fit is not None:
            args = training_args(recipe, out, **config.fit, push_to_hub=False)
            title = f"{TEACHER} {name}" if len(configs) > 1 else TEACHER
            parts.append(_stretch(title, args, _steps(args, images)))
    args = training_args(recipe, out)
    steps = _steps(args, images)
    arms = [ALONE] if configs and recipe.baseline else []
    for name in [*arms, DISTILLED if configs else STUDENT]:
        alone = replace(recipe, teacher=None, teachers=None).resolved() if name == ALONE else recipe
        phases = alone.phases or ()
        shares = steps_of([phase.share for phase in phases], steps) if phases and steps else [0] * len(phases)
        parts += [_stretch(f"{name}, phase {one.name}", args, own) for one, own in zip(phases, shares, strict=True)]
        parts += [] if phases else [_stretch(name, args, steps)]
    return RunClock(parts, _length(data.eval), _length(scored))


def _stretch(title: str, args: CanKDConfig, steps: int) -> Stretch:
    return Stretch(title, steps, evaluations_of(args, steps))


def _steps(args: CanKDConfig, images: int) -> int:
    """Steps of a training; 0 where a stream has to be read to know."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(images / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(1, batches // args.gradient_accumulation_steps)) if images else 0


def _length(dataset: Any) -> int:
    return len(dataset) if isinstance(dataset, Sized) else 0
