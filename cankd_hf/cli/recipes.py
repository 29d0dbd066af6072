"""`python -m cankd_hf.recipes`: the recipes that come with the package."""

import argparse
import sys
from collections.abc import Sequence

from cankd_hf.commands import command_parser, console, exit_code
from cankd_hf.config.reading import read_text
from cankd_hf.config.shipped import shipped_files, summary

EXAMPLES = """examples:
  python -m cankd_hf.recipes
  python -m cankd_hf.recipes show dinov2_seg
  python -m cankd_hf.recipes show dinov2_seg > mine.yaml
  python -m cankd_hf.recipes --comparisons

The train command takes a recipe by its name: python -m cankd_hf.train dinov2_seg data.path=/data/mine

exit codes: 0 done, 2 there is no such recipe"""


def parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    made = command_parser("recipes", "List the recipes that come with the package, or print one.", EXAMPLES)
    made.add_argument("action", nargs="?", metavar="list|show", default="list", help="default: list")
    made.add_argument("name", nargs="?", help="of the recipe to print")
    made.add_argument("--comparisons", action="store_true", help="the files of the compare command instead")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    made = parser()
    options = made.parse_args(argv)
    if options.action not in ("list", "show") and options.name is None:  # the name alone
        options.action, options.name = "show", options.action
    if (options.action == "show") != (options.name is not None):
        made.error("name a recipe to show: cankd recipes show NAME")
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    kind = "comparison" if options.comparisons else "recipe"
    if options.name is not None:
        sys.stdout.write(read_text(options.name, kind))
        return 0
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for file in shipped_files(kind):
        table.add_row(file.stem, summary(read_text(file, kind)))
    console().print(table)
    return 0
