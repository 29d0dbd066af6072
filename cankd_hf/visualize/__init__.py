"""`python -m cankd_hf.visualize CHECKPOINT --images FILE ...`: figures of what a student learnt, in one report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cankd_hf.commands import command_parser, exit_code
from cankd_hf.config.named import check_named
from cankd_hf.errors import InputError
from cankd_hf.host import read_host, wait_passively

EXAMPLES = """examples:
  python -m cankd_hf.visualize runs/quickstart
  python -m cankd_hf.visualize runs/camvid_seg --images street.jpg crossing.png --pixel 360,480
  python -m cankd_hf.visualize runs/bccd_det/checkpoint-500 teacher.model=/models/bccd_teacher --output looks
  python -m cankd_hf.visualize me/my-student --images photo.jpg

The recipe saved beside the checkpoint says where the teacher is and how images are resized; overrides change that.
Written are report.html, which holds everything it shows, and each figure as a PNG.

exit codes: 0 written, 2 bad input (the message says what), 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    description = "Show what a student sees beside its teacher: maps, attention, training curves, one HTML report."
    made = command_parser("visualize", description, EXAMPLES)
    made.add_argument("checkpoint", help="folder of a run or of a checkpoint, or a Hub id")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the saved recipe")
    made.add_argument("--images", nargs="+", metavar="FILE", help="images (default: some of the recipe's own split)")
    made.add_argument("--count", type=int, default=3, help="how many of the recipe's own images (default: 3)")
    shown = "whose attention to show: row,column in the image (default: centre)"
    made.add_argument("--pixel", type=_pixel, metavar="Y,X", help=shown)
    made.add_argument("--output", metavar="DIR", help="where to write (default: visualize/ inside of the checkpoint)")
    return made


def _pixel(text: str) -> tuple[int, int]:
    row, comma, column = text.partition(",")
    if not comma or not row.strip().isdecimal() or not column.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"expected Y,X, two whole numbers like 120,80, got {text!r}")
    return int(row), int(column)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    return exit_code(lambda: _run(options), "figures that were finished are kept")


def _run(options: argparse.Namespace) -> int:
    if options.count < 1:
        raise InputError(f"--count: expected at least 1, got {options.count}")
    check_named(options.checkpoint, options.checkpoint, "a folder or a Hub id")
    host = read_host()
    wait_passively(host)  # before torch is imported
    from cankd_hf.runs.threads import settle_threads
    from cankd_hf.visualize.session import visualize

    print(settle_threads(host))
    output = Path(options.output) if options.output else None
    report = visualize(options.checkpoint, options.overrides, options.images, options.count, options.pixel, output)
    print(f"Look at {report}")
    return 0
