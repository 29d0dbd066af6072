"""`python -m cankd_hf.evaluate CHECKPOINT [data.key=value ...]`: scores a saved student."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cankd_hf.commands import check_file, command_parser, console, exit_code, importing
from cankd_hf.config.named import check_named
from cankd_hf.errors import InputError
from cankd_hf.host import read_host, wait_passively
from cankd_hf.names import RECIPE_FILE

if TYPE_CHECKING:
    from cankd_hf.tasks import Task

EXAMPLES = """examples:
  python -m cankd_hf.evaluate runs/quickstart
  python -m cankd_hf.evaluate runs/camvid_seg data.path=/data/camvid --split test
  python -m cankd_hf.evaluate me/my-student data.path=me/my-data --json scores.json

The data are read as in the recipe saved with the checkpoint; overrides change its settings.

exit codes: 0 scored, 2 bad input (the message says what), 130 interrupted"""

# What the Trainer adds, and says nothing about a saved student.
_NO_SCORES = {"model_preparation_time", "epoch"}


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    description = "Score a saved student on a data set."
    made = command_parser("evaluate", description, EXAMPLES)
    made.add_argument("checkpoint", help="folder of a student or of a checkpoint, or a Hub id")
    made.add_argument("overrides", nargs="*", metavar="data.key=value", help="where the data are and how to read them")
    made.add_argument("--split", choices=("test", "validation"), help="which split (default: test where there is one)")
    made.add_argument("--batch-size", type=int, default=8, help="images at a time on each device (default: 8)")
    made.add_argument("--json", metavar="FILE", help="also write the scores to this file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from cankd_hf.config.reading import load_data_config
    from cankd_hf.json_text import to_json

    _check(options)
    saved = Path(options.checkpoint) / RECIPE_FILE
    config = load_data_config(saved if saved.is_file() else None, options.overrides)

    host = read_host()
    wait_passively(host)  # before torch is imported
    with importing():
        from rich.table import Table
        from transformers.utils.logging import disable_progress_bar

        from cankd_hf.runs.launch import leave_together
        from cankd_hf.runs.threads import settle_threads
        from cankd_hf.training.arguments import CanKDConfig
        from cankd_hf.training.trainer import CanKDTrainer

    threads = settle_threads(host)
    disable_progress_bar()  # of loading weights
    splits = {"test": ("test",), "validation": ("eval",), None: ("eval", "test")}[options.split]
    task, data = _task(options.checkpoint, saved).from_data(config, splits=splits)
    dataset = data.test if data.test is not None else data.eval
    if dataset is None:
        raise InputError("data: expected a split to score on, found none; name it with data.test_split")
    model = task.load(options.checkpoint)
    if task.id2label and model.config.num_labels != len(task.id2label):
        raise InputError(
            f"{options.checkpoint}: the student knows {model.config.num_labels} classes, the data have "
            f"{len(task.id2label)}; name the data set it was trained for"
        )
    with tempfile.TemporaryDirectory() as scratch:  # the Trainer makes its output folder at once
        args = CanKDConfig(
            scratch,
            per_device_eval_batch_size=options.batch_size,
            report_to="none",
            save_strategy="no",
            disable_tqdm=False,
        )
        if args.process_index == 0:
            print(threads, file=sys.stderr)
        scores = CanKDTrainer(model, None, args, task=task, eval_dataset=dataset).evaluate()
    scores = {key.removeprefix("eval_"): value for key, value in scores.items()}
    scores = {key: value for key, value in scores.items() if key not in _NO_SCORES}
    scored = _named("test" if dataset is data.test else "validation", dataset)
    table = Table()
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in scores.items():
        table.add_row(name, f"{value:.4f}")
    console().print(f"{options.checkpoint} on {config.path} ({scored}, float32)", soft_wrap=True, highlight=False)
    console().print(table)
    if half := _half(saved):
        print(f"The run itself scored in {half}: its last digits may differ.")
    if options.json:
        Path(options.json).write_text(to_json(scores), encoding="utf-8")
    leave_together()
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises InputError for options that make no sense, and for a student that cannot be there."""
    check_file(options.json, "--json")
    if options.json and Path(options.json).is_dir():
        raise InputError(f"--json: expected a file, got the folder {options.json}; name a file in it")
    if options.batch_size < 1:
        raise InputError(f"--batch-size: expected at least 1, got {options.batch_size}")
    check_named(options.checkpoint, options.checkpoint, "a saved student")
    if Path(options.checkpoint).is_dir() and not (Path(options.checkpoint) / "config.json").is_file():
        raise InputError(
            f"{options.checkpoint}: expected a saved student, found no config.json; name a run or a checkpoint-N"
        )


def _half(saved: Path) -> str | None:
    """The half precision in which the run scored, if it did."""
    from cankd_hf.config.reading import read_saved

    training = (read_saved(saved).get("training") or {}) if saved.is_file() else {}
    return next((name for name in ("bf16", "fp16") if training.get(name)), None)


def _named(split: str, images: Any) -> str:
    """What was scored, and how much of it."""
    return f"{split} split" + (f", {len(images):,} images" if hasattr(images, "__len__") else "")


def _task(checkpoint: str, saved: Path) -> type[Task]:
    """The task of the student: from its recipe, else from the name of its class."""
    from cankd_hf.config.advice import not_one_of
    from cankd_hf.config.reading import read_saved
    from cankd_hf.config.recipe import Recipe
    from cankd_hf.tasks import TASKS, saved_task

    if saved.is_file():
        named = str(read_saved(saved).get("task") or Recipe.task)
        if named not in TASKS:
            raise InputError(f"{saved}: task: {not_one_of(named, TASKS)}")
        task = TASKS[named]
    else:
        task = saved_task(checkpoint)
    if task.needs_teacher_in_evaluation:
        raise InputError(
            f"{checkpoint}: expected a student that is scored by labels, got one of the task {task.name!r}; its "
            "scores compare it with its teacher and are in the results.json of its run"
        )
    return task
