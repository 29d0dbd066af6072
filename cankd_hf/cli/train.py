"""`python -m cankd_hf.train RECIPE [section.key=value ...]`: from a recipe to a distilled student."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cankd_hf.commands import command_parser, exit_code, importing
from cankd_hf.errors import InputError
from cankd_hf.host import read_host, wait_passively
from cankd_hf.names import STATE_FILE

EXAMPLES = """examples:
  python -m cankd_hf.train recipes/quickstart.yaml
  python -m cankd_hf.train recipes/camvid_seg.yaml data.path=/data/camvid training.max_steps=300
  python -m cankd_hf.train recipes/dinov2_seg.yaml --dry-run
  accelerate launch -m cankd_hf.train recipes/dinov2_seg.yaml

exit codes: 0 done, 2 bad input (what was trained before is kept), 130 stopped (the same command continues)"""


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy: --help must answer at once."""
    description = "Train a student by distillation from a teacher, as described in a recipe."
    made = command_parser("train", description, EXAMPLES)
    made.add_argument("recipe", help="YAML file; every key is explained in docs/recipes.md")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    made.add_argument("--dry-run", action="store_true", help="show what would happen, run one step, train nothing")
    made.add_argument(
        "--restart",
        action="store_true",
        help="start over if the output folder contains a run (the old one is renamed)",
    )
    made.add_argument("--resume", metavar="CHECKPOINT", help="continue from this checkpoint (default: the newest one)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    # intermixed: options may come between overrides.
    options = parser().parse_intermixed_args(argv)
    # Ctrl-C during loading, scoring or pushing; during training it saves a checkpoint.
    return exit_code(lambda: _run(options), "what was finished is kept, and the same command continues from it")


def _run(options: argparse.Namespace) -> int:
    from cankd_hf.runs.recipe import load_recipe

    if options.resume is not None and not (Path(options.resume) / STATE_FILE).is_file():
        raise InputError(
            f"--resume: expected the folder of a checkpoint, got {options.resume!r} without a {STATE_FILE}; name a "
            "checkpoint-N, or leave it out to go on from the newest one"
        )
    host = read_host()
    wait_passively(host)  # before torch is imported
    with importing():
        recipe = load_recipe(options.recipe, options.overrides, to_run=True, restart=options.restart)
        # Imported after the checks, because these imports take seconds.
        from cankd_hf.cli.report import print_report
        from cankd_hf.runs.launch import leave_together
        from cankd_hf.runs.run import Stopped
        from cankd_hf.runs.students import run_all
        from cankd_hf.runs.threads import settle_threads

        if options.dry_run:
            from cankd_hf.cli.dry_run import dry_run
    workers = recipe.training.get("dataloader_num_workers") or 0
    recipes = [recipe.of_student(name) for name in recipe.students] if recipe.students else [recipe]
    threads = settle_threads(host, None if options.restart else Path(recipes[0].output_dir), workers)
    if options.dry_run:
        print(threads)
        return max(dry_run(one, options.restart, host) for one in recipes)
    try:
        reports = run_all(recipe, options.restart, options.resume, [threads])
    except Stopped as stopped:
        leave_together()
        print(f"Stopped; a checkpoint is in {stopped.folder}. The same command continues from it.", file=sys.stderr)
        return 130
    for report in reports:
        print_report(report)
    leave_together()
    return 0
