"""Loads a recipe: checks its structure first, then its values with the classes of models and losses."""

from collections.abc import Sequence
from pathlib import Path

from cankd_hf.config.reading import read_recipe, read_text
from cankd_hf.config.recipe import Recipe


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), to_run: bool = False, restart: bool = False
) -> Recipe:
    """Reads a recipe, applies overrides, and checks everything that can be checked without data or weights.

    Args:
        path: a YAML file.
        overrides: `section.key=value` as on the command line; list items by number (`distill.terms.0.weight=5`),
            `teacher=null` for none.
        to_run: also check what a run needs of this machine, as `run` itself does: places, packages, rights.
        restart: whether the run is to start over in its folder.

    Raises:
        InputError: with every problem found, each with its dotted path, file and line: those of structure, or if there
            are none, those found by the classes of models, losses and arguments.
    """
    return parse_recipe(read_text(path), overrides, str(path), to_run, restart)


def parse_recipe(
    text: str, overrides: Sequence[str] = (), source: str = "recipe", to_run: bool = False, restart: bool = False
) -> Recipe:
    """Like `load_recipe`, for YAML in a string; `source` is its name in messages."""
    recipe, problems = read_recipe(text, overrides, source, to_run)
    from cankd_hf.runs.checks import check_models  # imports torch, which takes seconds

    check_models(recipe, problems)
    if to_run:
        from cankd_hf.runs.session import check_machine

        check_machine(recipe.resolved(), problems, restart)
    problems.raise_all()
    return recipe.resolved()
