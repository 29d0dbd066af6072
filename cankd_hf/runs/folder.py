"""The output folder of a run, and protection of earlier runs in it."""

import logging
from itertools import count
from pathlib import Path

from cankd_hf.config.recipe import Recipe, recipe_differences, recipe_to_yaml
from cankd_hf.errors import InputError
from cankd_hf.names import ARM_FILE, RECIPE_FILE
from cankd_hf.training.arguments import CanKDConfig

logger = logging.getLogger(__name__)


def claim(out: Path, recipe: Recipe, restart: bool, args: CanKDConfig) -> None:
    """Creates the output folder; InputError if it contains a run of another recipe, which is never overwritten."""
    file = out / RECIPE_FILE
    with args.main_process_first(local=False, desc="claiming the output folder"):
        if restart and holds_work(out):
            _set_aside(out)
        elif file.is_file() and holds_work(out):
            differences = recipe_differences(file.read_text(encoding="utf-8"), recipe)
            if differences:
                raise InputError(
                    f"output_dir {out}: holds a run of another recipe ({'; '.join(differences[:5])}); choose another "
                    "output_dir, or start over in this one with --restart, which moves the old one aside"
                )
        if args.process_index == 0:
            out.mkdir(parents=True, exist_ok=True)
            file.write_text(recipe_to_yaml(recipe), encoding="utf-8")


def holds_work(out: Path) -> bool:
    """Whether a folder contains a checkpoint or a finished arm, itself or in a subfolder."""
    return any(
        True for pattern in ("checkpoint-*", ARM_FILE) for depth in ("", "*/") for _ in out.glob(depth + pattern)
    )


def _set_aside(out: Path) -> None:
    """Renames the folder of an earlier run, so that the new run does not resume from its checkpoints."""
    if out.resolve() == Path.cwd().resolve():
        raise InputError(f"output_dir {out}: cannot be moved aside, it is the current folder; name another one")
    number = next(n for n in count(1) if not out.with_name(f"{out.name}.before{n}").exists())
    target = out.with_name(f"{out.name}.before{number}")
    out.rename(target)
    logger.warning("starting over: what was in %s is now in %s", out, target)
