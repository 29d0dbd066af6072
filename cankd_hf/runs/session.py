"""What a run needs of this machine: one list of checks, for a run and for its dry run, all told at once."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from cankd_hf.config.advice import nearest, not_one_of
from cankd_hf.config.parts import phase_parts
from cankd_hf.config.places import missing_places
from cankd_hf.config.recipe import Recipe
from cankd_hf.config.schema import Problems
from cankd_hf.errors import InputError
from cankd_hf.hub.upload import check_target
from cankd_hf.runs.build import training_args
from cankd_hf.runs.checks import attempt
from cankd_hf.runs.folder import check_recipe_of
from cankd_hf.runs.launch import check_launch
from cankd_hf.tasks import TASKS
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.checkpoint_files import check_folder

# Trackers that transformers does not count among the installed ones, but accepts.
_UNCOUNTED = {"azure_ml", "flyte"}


def check_session(recipe: Recipe, restart: bool = False) -> None:
    """Raises InputError with everything that would stop a run and that shows without reading data or weights."""
    problems = Problems()
    for key, message in missing_places(recipe):
        problems.say(key, message)
    check_machine(recipe, problems, restart)
    problems.raise_all()


def check_machine(recipe: Recipe, problems: Problems, restart: bool = False) -> None:
    """Adds problems with the output folder, trackers, the Hub, scores, launch and training arguments."""
    out = Path(recipe.output_dir)  # the messages of these checks have their places
    first = os.environ.get("RANK", "0") == "0"  # of several processes one tries, else one removes what another tries
    if (not first or _passes(problems, partial(_try_folder, out))) and not restart:
        _passes(problems, partial(check_recipe_of, out, recipe))
    for key, message in [*_trackers(recipe), *_scores(recipe)]:
        problems.say(f"training.{key}", message)
    if problems.found and not problems.usable("training"):
        return
    try:
        args = training_args(recipe, out)
    except InputError as error:
        problems.take(error, "training")
        return
    for place, part in phase_parts(recipe):
        try:
            training_args(part, out)
        except InputError as error:
            problems.take(error, f"{place}.training")
    _passes(problems, partial(check_launch, args.world_size))
    attempt(problems, "training.optim", partial(_optimizer, args))
    if args.push_to_hub:
        name = args.hub_model_id or out.absolute().name
        _passes(problems, partial(check_target, name))


def _passes(problems: Problems, check: Callable[[], None]) -> bool:
    """Runs a check and adds its problems."""
    try:
        check()
    except InputError as error:
        problems.take(error, "")
        return False
    return True


def _try_folder(out: Path) -> None:
    """Checks that the folder can be made and written, and leaves nothing behind."""
    made = [place for place in (out, *out.parents) if not os.path.lexists(place)]
    try:
        check_folder(out)
    finally:
        for place in made:
            with suppress(OSError):  # it could not be made, or another process uses it already
                place.rmdir()


def _optimizer(args: CanKDConfig) -> None:
    """Makes optimizer and schedule of one number, as the Trainer makes those of the student."""
    if args.optim_target_modules is not None or args.deepspeed:
        return  # it looks for parts of the real model, or is made elsewhere
    model = nn.Linear(1, 1)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
    optimizer = kind([{"params": list(model.parameters())}], **options)
    steps = {"num_warmup_steps": args.get_warmup_steps(10), "num_training_steps": 10}
    kwargs: Any = args.lr_scheduler_kwargs
    if not args.lr_drops:
        get_scheduler(args.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=kwargs)


def _trackers(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Trackers in `report_to` that transformers does not know, or that are not installed."""
    named = recipe.training.get("report_to") or []
    for name in [named] if isinstance(named, str) else named:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            yield "report_to", not_one_of(name, ["none", "all", *INTEGRATION_TO_CALLBACK])
        elif name not in {*get_available_reporting_integrations(), *_UNCOUNTED}:
            yield "report_to", f"{name} is not installed; install its package, or leave it out"


def _scores(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """A `metric_for_best_model` that the task never computes."""
    name, task = recipe.training.get("metric_for_best_model"), TASKS[recipe.task]
    score = str(name).removeprefix("eval_")
    if name is None or score in ("loss", *task.metrics) or score.startswith(task.further_scores):
        return
    known = ["loss", *task.metrics, *(f"{start}..." for start in task.further_scores)]
    yield "metric_for_best_model", f"expected one of {', '.join(known)}, got {name!r}; {nearest(score, known)}"
