"""How long a run takes, and what memory and disk: what each choice of teacher costs, from measured steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from cankd_hf.config.parts import spanning
from cankd_hf.config.phases import Phase
from cankd_hf.config.recipe import Recipe
from cankd_hf.errors import InputError
from cankd_hf.host import usable_cores
from cankd_hf.runs import adapting
from cankd_hf.runs.build import SCORE_ONLY, build_student, make_trainer, training_args
from cankd_hf.runs.measured import Measured, count, measure, ready
from cankd_hf.tasks import Task, TaskData
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.cache_plan import Plan
from cankd_hf.training.trainer import CanKDTrainer

VIEWS = (1, 4)  # of a cached teacher, to compare
ALONE, LIVE, WHOLE = "student alone", "teacher live", "cached, whole images"


@dataclass(frozen=True)
class Choice:
    """What a run costs, or a part of it.

    Attributes:
        name: what is chosen, in words.
        step: seconds of one step, on average.
        training: seconds of all steps, with those for filling a cache.
        scoring: seconds of all evaluations.
        memory: bytes of one process, beside the program itself.
        disk: bytes of what the run leaves, and of a cache.
        filling: seconds of `training` for the answers of the teachers that are not stored yet.
        stored: bytes of `disk` for stored answers.
        chosen: whether the recipe does this.
    """

    name: str
    step: float
    training: float
    scoring: float
    memory: int
    disk: int
    filling: float = 0.0
    stored: int = 0
    chosen: bool = False

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.training + self.scoring


@dataclass
class Forecast:
    """The choices of one part of a run.

    Attributes:
        choices: the one of the recipe among them.
        measured: the parts of a step.
        steps: optimizer steps.
        notes: what was left out, in words.
    """

    choices: list[Choice]
    measured: Measured
    steps: int
    notes: list[str]

    @property
    def chosen(self) -> Choice:
        """What the recipe does."""
        return next(choice for choice in self.choices if choice.chosen)


def steps_of(trainer: CanKDTrainer) -> int:
    """Optimizer steps of a trainer."""
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def evaluations(args: CanKDConfig, steps: int, per_epoch: float) -> int:
    """How often a run is evaluated before its end."""
    strategy = IntervalStrategy(args.eval_strategy)
    if strategy == IntervalStrategy.EPOCH:
        return math.ceil(steps / per_epoch) if per_epoch else 0
    return _times(strategy, args.eval_steps or args.logging_steps, steps)


def _times(strategy: IntervalStrategy, every: float | None, steps: int) -> int:
    if strategy != IntervalStrategy.STEPS or not every:
        return 0
    return steps // max(1, int(every if every >= 1 else math.ceil(every * steps)))


def checkpoints(args: CanKDConfig, steps: int, per_epoch: float) -> int:
    """Checkpoints that are on the disk at once, the one being written among them."""
    strategy = IntervalStrategy(getattr(args.save_strategy, "value", args.save_strategy).replace("best", "steps"))
    made = _times(strategy, args.save_steps, steps)
    if strategy == IntervalStrategy.EPOCH and per_epoch:
        made = math.ceil(steps / per_epoch)
    limit = args.save_total_limit
    return made if limit is None or limit <= 0 else min(made, limit + 1)


@dataclass
class _Costing:
    """Makes choices of what was measured."""

    recipe: Recipe
    trainer: CanKDTrainer
    args: CanKDConfig
    data: TaskData
    measured: Measured
    steps: int

    @property
    def images(self) -> int:
        """Of one optimizer step, in all processes."""
        return self.measured.images * self.args.gradient_accumulation_steps * self.args.world_size

    def step(self, compute: float) -> float:
        """Seconds of an optimizer step whose forward and backward take `compute` for each batch."""
        batches, read = self.args.gradient_accumulation_steps, self.read
        busy = batches * compute + self.measured.median("optimizer")
        workers = min(self.args.dataloader_num_workers, usable_cores())
        return max(busy, batches * read / workers) if workers else busy + batches * read

    @property
    def read(self) -> float:
        """Seconds in which a process reads a batch; with `data.cache` images are decoded in the first epoch alone."""
        read, again = self.measured.median("read"), self.measured.median("reread")
        if not self.recipe.data.cache or not self.per_epoch or again > read:
            return read
        return again + (read - again) * min(1.0, self.per_epoch / max(1, self.steps))

    @property
    def live(self) -> float:
        """Forward and backward where the teachers are asked, in each n-th step with `every`."""
        every = min((one.config.every for one in self.trainer.teachers.values()), default=1)
        live, alone = self.measured.median("live"), self.measured.median("alone")
        return (live + (every - 1) * alone) / every if every > 1 and alone else live

    def choice(self, name: str, compute: float, chosen: bool, memory: str = "live", **more: Any) -> Choice:
        """One choice; `more` are the attributes of a cache."""
        step = self.step(compute)
        training = step * self.steps + more.get("filling", 0.0)
        scoring, disk = self.scoring(), self.disk() + more.get("stored", 0)
        return Choice(
            name,
            training / max(1, self.steps),
            training,
            scoring,
            self.measured.memory[memory],
            disk,
            chosen=chosen,
            **more,
        )

    def cached(self, views: int | None, chosen: bool) -> Choice:
        """Stored answers of so many views of each image, or of whole images (None), in both orientations: each is
        computed once, in the step that asks for it first."""
        trainer, images = self.trainer, len(self.trainer.train_dataset)  # type: ignore[arg-type]
        answers = min(images * (views or 2), self.steps * self.images)
        share = 1.0 if views is not None else trainer.whole_share or 1.0  # what was measured are the step's pictures
        there = {name: trainer._found(name) for name in trainer.caches} if chosen else {}
        asking = self.measured.median("teachers") / self.measured.images
        plans = [
            Plan(
                answers,
                round(share * size),
                share * asking / len(self.measured.answer),
                len(there[name] or ()) if name in there else 0,
            )
            for name, size in self.measured.answer.items()
        ]
        filling = sum(plan.missing * plan.seconds for plan in plans) / self.args.world_size
        stored = sum(plan.answers * plan.size for plan in plans)
        named = WHOLE if views is None else f"cached, {views} view{'s' if views > 1 else ''}"
        compute = self.measured.median("replayed") + (self.measured.median("cut") if views is None else 0.0)
        return self.choice(named, compute, chosen, filling=filling, stored=stored)

    def choices(self) -> list[Choice]:
        """What the recipe does, and what else it could do."""
        found, measured, trainer = [], self.measured, self.trainer
        if measured.median("alone"):
            found.append(self.choice(ALONE, measured.median("alone"), not trainer.teachers, "alone"))
        if not trainer.teachers:
            return found or [self.choice("student", measured.median("live"), True)]
        views = {cache.views for cache in trainer.caches.values() if cache.views is not None}
        found.append(self.choice(LIVE, self.live, not trainer.caches))
        if measured.answer and hasattr(trainer.train_dataset, "__len__"):
            found += [self.cached(number, number in views) for number in sorted({*VIEWS, *views})]
            if trainer.can_store_whole_images:
                found.append(self.cached(None, trainer.stores_whole_images))
        return found

    def scoring(self) -> float:
        """Seconds of the evaluations during the run and of the one at its end."""
        if not self.measured.evaluated:
            return 0.0
        image = self.measured.median("evaluation") / self.measured.evaluated
        test = self.data.test if self.data.test is not None else self.data.eval
        often = evaluations(self.args, self.steps, self.per_epoch)
        sizes = [len(one) if hasattr(one, "__len__") else 0 for one in (self.data.eval, test)]
        return image * (often * sizes[0] + sizes[1]) / self.args.world_size

    @property
    def per_epoch(self) -> float:
        """Optimizer steps of an epoch; 0 for a stream."""
        data: Any = self.trainer.train_dataset
        return len(data) / self.images if hasattr(data, "__len__") else 0.0

    def disk(self) -> int:
        """Bytes of checkpoints, with the two moments of AdamW, and of the student."""
        trained = sum(one.numel() for one in self.trainer.distiller.parameters() if one.requires_grad)
        each = 4 * (count(self.trainer.distiller) + 2 * trained)
        return checkpoints(self.args, self.steps, self.per_epoch) * each + 4 * count(self.trainer.distiller.student)


def forecast(
    recipe: Recipe,
    trainer: CanKDTrainer,
    data: TaskData,
    measured: Measured,
    phase: Phase | None = None,
    steps: int | None = None,
) -> Forecast:
    """What a part of a run costs, and what it would cost with other choices.

    Args:
        recipe: of the part; that of a phase has the steps of the whole run.
        trainer: of the part.
        data: its data sets.
        measured: the parts of one of its steps.
        phase: whose share of the steps is its own.
        steps: other optimizer steps than those of the recipe.
    """
    total = steps or steps_of(trainer)  # before further arguments are made, which end the trainer's accelerator
    steps = total if phase is None else max(1, round(total * phase.share))
    args = training_args(spanning(recipe, steps, total) if phase is not None else recipe, Path(recipe.output_dir))
    notes = []
    if not measured.evaluated and data.eval is not None:
        notes.append("The validation split is a stream: scoring is not counted.")
    return Forecast(_Costing(recipe, trainer, args, data, measured, steps).choices(), measured, steps, notes)


def fit_costs(recipe: Recipe, task: Task, data: TaskData, scratch: Path) -> dict[str, Choice]:
    """What it costs to train the teachers that have `fit` first, by their names."""
    found = {}
    for name, config in recipe.named_teachers().items():
        if config.fit is None:
            continue
        model = adapting.untrained(config)
        alone = replace(recipe, teacher=None, teachers=None, phases=None).resolved()
        args = training_args(alone, scratch, **{**config.fit, **SCORE_ONLY, "disable_tqdm": True})
        trainer = make_trainer(alone, task, data, build_student(recipe, task, model), {}, args)
        measured = measure(trainer, *ready(trainer))
        fitted = replace(alone, training={**alone.training, **config.fit})
        made = forecast(fitted, trainer, data, measured).chosen
        found[name] = replace(made, name="training the teacher" + (f" {name}" if name != "teacher" else ""))
    return found


def summed(parts: Sequence[Forecast]) -> list[Choice]:
    """The choices that all phases of a run have, as those of the whole run; a phase without teachers has one."""
    found = []
    for name in dict.fromkeys(choice.name for part in parts for choice in part.choices):
        given = [_named(part, name) or (part.choices[0] if len(part.choices) == 1 else None) for part in parts]
        row = [one for one in given if one is not None]
        if len(row) < len(parts):
            continue
        steps = sum(part.steps for part in parts)
        training = sum(one.training for one in row)
        found.append(
            Choice(
                name,
                training / steps,
                training,
                sum(one.scoring for one in row),
                max(one.memory for one in row),
                sum(one.disk for one in row),
                sum(one.filling for one in row),
                sum(one.stored for one in row),
                all(one.chosen for one in row),
            )
        )
    return found


def _named(part: Forecast, name: str) -> Choice | None:
    return next((choice for choice in part.choices if choice.name == name), None)


def whole(parts: Sequence[Forecast], fits: Mapping[str, Choice], baseline: bool) -> Choice:
    """All that the recipe does: the teachers that it trains, the student alone if it is asked for, and its parts.

    Raises:
        InputError: without a part.
    """
    if not parts:
        raise InputError("recipe: expected a part to train, got none")
    rows = [part.chosen for part in parts] + list(fits.values())
    alone = [one for part in parts if (one := _named(part, ALONE)) is not None and not one.chosen]
    rows += alone if baseline else []
    steps = sum(part.steps for part in parts)
    return Choice(
        "this recipe",
        sum(part.chosen.training for part in parts) / steps,
        sum(row.training for row in rows),
        sum(row.scoring for row in rows),
        max(row.memory for row in rows),
        sum(row.disk for row in rows),
        sum(row.filling for row in rows),
        sum(row.stored for row in rows),
        True,
    )
