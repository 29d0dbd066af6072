"""What a step of each arm costs on this machine: all arms in turn, so that other load meets all of them alike."""

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.compare.prices import MOST_ROUNDS
from cankd_hf.compare.records import unit_of
from cankd_hf.config.data import DataConfig
from cankd_hf.config.parts import part_of
from cankd_hf.config.recipe import Recipe
from cankd_hf.errors import InputError
from cankd_hf.models.weight_files import share
from cankd_hf.runs.build import SCORE_ONLY, build_student, build_trainer
from cankd_hf.runs.phases import open_phase
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import TASKS, Task, TaskData
from cankd_hf.training.monitoring.cost import CPU, DEVICE, PREPAID, WALL, CostMeter, cpu_seconds
from cankd_hf.training.trainer import CanKDTrainer

logger = logging.getLogger(__name__)

ROUNDS, STEPS = 3, 4
_SCORED = 8  # images of the trial evaluation


class StepClock(TrainerCallback):
    """Costs of the steps after the first, with what lies between them: data, optimizer, callbacks.

    Attributes:
        costs: seconds of a step by CPU and clock, for each call of `train()`.
    """

    def __init__(self) -> None:
        self.costs: list[dict[str, float]] = []
        self._first: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if 1 < state.global_step < state.max_steps:
            return
        on_device = args.device.type != "cpu"
        if on_device:
            torch.accelerator.synchronize()
        now = {CPU: cpu_seconds(), DEVICE if on_device else WALL: time.perf_counter()}
        if state.global_step == 1:
            self._first = now
        else:
            self.costs.append({name: (now[name] - self._first[name]) / (state.max_steps - 1) for name in now})


def calibrate(
    arms: Mapping[str, str],
    teachers: Mapping[str, str],
    rounds: int = ROUNDS,
    steps: int = STEPS,
    precision: float | None = None,
    by_clock: bool = False,
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Measures a few steps of each arm, A B C A B C, and returns their means.

    Args:
        arms: name -> file of its recipe.
        teachers: folder of a teacher that may not be trained yet -> file of the recipe that trains it. Until then one
            with random weights takes its place: it costs the same.
        rounds: how often each has its turn, beside a first one that is not counted.
        steps: number of steps that are measured in a turn.
        precision: go on until the step of each arm is known to this standard error, relative to it; after
            `MOST_ROUNDS` turns it is enough. None: after `rounds`.
        by_clock: whether that is asked of seconds by the clock, see `unit_of`.
        say: is told after each turn how well the steps are known.

    Returns:
        `arms`: name -> seconds of a step by `cpu_seconds` and `wall_seconds` (on an accelerator `device_seconds`):
        the mean over the turns without the tenth of them, at least one, that took longest, and as many of the
        shortest; `errors`: name -> the standard error of that by clock, relative to it;
        `before`: name -> seconds by clock that each run spends before its first step: on its data, such as labels of
        a teacher, and on answers of a teacher for whole images, by those that the measured steps stored;
        `failed`: name -> why an arm cannot be trained, so that the others go on without it; `evaluation`: seconds by
        the clock to score all images once; `start`: seconds from the start of the process until the first trainer is
        there.

    Raises:
        InputError: with what is wrong with each arm, if no arm can be trained.
    """
    started = 0.0
    with ExitStack() as stack:
        folders = _stand_ins(teachers, stack)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened: dict[str, tuple[Task, TaskData]] = {}
        runs: dict[str, list[_Timed]] = {}
        failed: dict[str, str] = {}
        for name, file in arms.items():
            with _naming(name, failed):
                runs[name] = _timed(_elsewhere(load_recipe(file), folders), scratch, steps + 1, opened)
            started = started or time.time() - psutil.Process().create_time()
        _measure(runs, failed, rounds, precision, by_clock, say)
        left = {name: run for name, run in runs.items() if name not in failed}
        if not left:
            raise InputError([f"{name}: {wrong}" for name, wrong in failed.items()])
        evaluation = _evaluation(next(iter(left.values()))[-1].trainer, next(iter(opened.values()))[1])
    return {
        "arms": {name: _mean_step(timed) for name, timed in left.items()},
        "errors": {name: _errors(timed) for name, timed in left.items()},
        "before": {name: _before(timed) for name, timed in left.items()},
        "failed": failed,
        "evaluation": evaluation,
        "start": started,
    }


class _Timed(NamedTuple):
    """A trainer whose steps are measured, and its share of the steps of an arm."""

    share: float
    trainer: CanKDTrainer
    clock: StepClock
    facts: Mapping[str, Any]  # of its data


def _stand_ins(teachers: Mapping[str, str], stack: ExitStack) -> dict[str, str]:
    """Folders of teachers with random weights for those that are not trained yet."""
    folders = {
        folder: stack.enter_context(tempfile.TemporaryDirectory())
        for folder in teachers
        if not (Path(folder) / "config.json").is_file()
    }
    for folder, made in folders.items():
        _save_untrained(load_recipe(teachers[folder]), Path(made))
    return folders


def _measure(
    runs: Mapping[str, Sequence[_Timed]],
    failed: dict[str, str],
    rounds: int,
    precision: float | None,
    by_clock: bool,
    say: Callable[[str], None],
) -> None:
    """The turns of `calibrate`."""
    known = math.inf
    for turn in range(1 + (rounds if precision is None else MOST_ROUNDS)):
        if precision is not None and known <= precision:
            return
        for name, timed in runs.items():
            if name not in failed:
                with _naming(name, failed):
                    for one in timed:
                        one.trainer.train()
        if turn >= rounds:
            errors = [_errors(timed) for name, timed in runs.items() if name not in failed]
            known = max((each[unit_of(each, by_clock)] for each in errors), default=0.0)
            say(f"turn {turn}: the step of each arm is known to {known:.1%}")


def _timed(recipe: Recipe, scratch: Path, steps: int, opened: dict[str, tuple[Task, TaskData]]) -> list[_Timed]:
    """The trainers of an arm: one for each of its phases, or one."""
    task, data = _opened(recipe, opened)
    made = []
    for phase in recipe.phases or ():
        part = part_of(recipe, phase)
        own = data if part.data == recipe.data else open_phase(replace(part, data=_unchecked(part.data)), task, data)
        trainer = build_trainer(part, task, own, scratch, **SCORE_ONLY, max_steps=steps)
        made.append(_Timed(phase.share, trainer, StepClock(), own.facts))
    if not made:
        trainer = build_trainer(recipe, task, data, scratch, **SCORE_ONLY, max_steps=steps)
        made = [_Timed(1.0, trainer, StepClock(), data.facts)]
    for one in made:
        one.trainer.add_callback(one.clock)
    return made


def _mean_step(timed: Sequence[_Timed]) -> dict[str, float]:
    """Seconds of the mean step of an arm by clock: means over the turns, those of phases by their shares."""
    return {
        unit: sum(one.share * trimmed_mean(_turns(one, unit)) for one in timed) for unit in timed[0].clock.costs[0]
    }


def _errors(timed: Sequence[_Timed]) -> dict[str, float]:
    """The standard error of that by clock, relative to it, as if no turn was left out: not too small; infinite after
    less than two turns."""
    if len(timed[0].clock.costs) < 3:
        return dict.fromkeys(timed[0].clock.costs[0], math.inf)
    mean = _mean_step(timed)
    return {unit: math.hypot(*(one.share * _error(_turns(one, unit)) for one in timed)) / mean[unit] for unit in mean}


def _turns(one: _Timed, unit: str) -> list[float]:
    return [turn[unit] for turn in one.clock.costs[1:]]


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without a tenth of the values, at least one, at either end: of three the median."""
    cut = max(1, len(values) // 10) if len(values) > 2 else 0
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _before(timed: Sequence[_Timed]) -> dict[str, float]:
    """Seconds that the data and stored answers of an arm cost, by clock; each thing once, whichever phases have it.

    Answers for whole images alone: how many others a run asks for depends on its steps.
    """
    spent = {name: seconds for one in timed for name, seconds in one.facts.get("prepaid", {}).items()}
    for one in timed:
        if one.trainer.stores_whole_images:
            images: Any = one.trainer.train_dataset
            answers = len(images) * one.trainer.answers_each
            spent |= {str(each.store.folder): each.store.price(answers) for each in one.trainer.stored.values()}
    meter = CostMeter()
    for name, seconds in spent.items():
        meter.prepay(name, seconds)
    units = timed[0].clock.costs[0]
    return {unit: meter.cost[unit + PREPAID] for unit in units} if spent else {}


@contextmanager
def _naming(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Keeps what goes wrong with an arm under its name, whatever it is; its own run will meet it too."""
    try:
        yield
    except Exception as error:
        logger.exception("%s", name)
        problems = error.problems if isinstance(error, InputError) else [str(error) or type(error).__name__]
        failed[name] = " ".join("; ".join(map(str, problems)).split())


def _unchecked(data: DataConfig) -> DataConfig:
    return replace(data, check="none")


def _open(recipe: Recipe) -> tuple[Task, TaskData]:
    return TASKS[recipe.task].from_data(_unchecked(recipe.data), labelled=recipe.labelled)


def _save_untrained(recipe: Recipe, folder: Path) -> None:
    task, _ = _open(recipe)
    model = build_student(recipe, task)
    model.save_pretrained(folder)
    share(folder)
    task.for_model(model).image_processor(recipe.data).save_pretrained(folder)


def _elsewhere(recipe: Recipe, folders: Mapping[str, str]) -> Recipe:
    """The recipe with the teachers that are not trained yet in the folders that stand in for theirs."""
    teachers = {
        name: replace(config, model=folders.get(str(config.model), config.model))
        for name, config in recipe.named_teachers().items()
    }
    return recipe.with_teachers(teachers)


def _opened(recipe: Recipe, opened: dict[str, tuple[Task, TaskData]]) -> tuple[Task, TaskData]:
    known = repr((recipe.task, recipe.data, recipe.labelled))
    if known not in opened:
        opened[known] = _open(recipe)
    return opened[known]


def _evaluation(trainer: CanKDTrainer, data: TaskData) -> float:
    """Seconds by the clock to score all images; 0 where there are none."""
    images = data.test if data.test is not None else data.eval
    if images is None:
        return 0.0
    count = min(_SCORED, len(images))
    start = time.perf_counter()
    trainer.evaluate(Subset(images, range(count)))
    return (time.perf_counter() - start) / count * len(images)
