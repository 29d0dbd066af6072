"""`python -m cankd_hf.probe CHECKPOINT FOLDER`: what a frozen model's features are good for, without training it."""

import argparse
from collections.abc import Sequence

from cankd_hf.commands import command_parser, exit_code
from cankd_hf.config.named import check_named
from cankd_hf.errors import InputError
from cankd_hf.host import read_host, wait_passively
from cankd_hf.names import TORCHVISION

EXAMPLES = """examples:
  python -m cankd_hf.probe runs/student data/camvid
  python -m cankd_hf.probe runs/student data/camvid --beside facebook/dinov2-base --size 240 320 --size 480 640
  python -m cankd_hf.probe facebook/dinov2-small data/rooms --task depth --json scores.json

What is probed follows from the labels: masks, linear segmentation; depth maps, linear depth; classes of images, kNN
and linear classification. The model is frozen; only the linear map is fitted, on the training split, and scored once
on the test split (or validation), with a 95% interval over its images.

exit codes: 0 scored, 2 bad input (the message says what), 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    made = command_parser("probe", "Score the frozen features of models by linear and kNN probes.", EXAMPLES)
    made.add_argument("checkpoint", help="folder or Hub id of a student or any other vision model, or timm/NAME")
    made.add_argument("folder", help="images with labels: a folder, or any other data set that data.path takes")
    made.add_argument("overrides", nargs="*", metavar="data.key=value", help="how the images are read")
    made.add_argument(
        "--beside", action="append", default=[], metavar="MODEL", help="another model to compare, such as the teacher"
    )
    made.add_argument("--task", help="whose labels are read (default: what the folder holds)")
    made.add_argument(
        "--size", type=int, nargs=2, action="append", default=[], metavar=("H", "W"), help="of the images; repeatable"
    )
    made.add_argument("--limit", type=int, metavar="N", help="images of the training split to fit on (default: all)")
    made.add_argument("--batch-size", type=int, default=8, help="images at a time (default: 8)")
    made.add_argument("--seed", type=int, default=0, help="of the cells that are fitted on, and the intervals")
    made.add_argument("--json", metavar="FILE", help="also write the scores to this file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)

    def run() -> int:
        check(options)
        host = read_host()
        wait_passively(host)  # before torch is imported
        from cankd_hf.probe import command  # here, so that --help is fast

        return command.run(options, host)

    return exit_code(run)


def check(options: argparse.Namespace) -> None:
    """Raises InputError with all options that make no sense."""
    problems = [
        f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}"
        for name, least in (("batch_size", 1), ("limit", 10), ("seed", 0))
        if getattr(options, name) is not None and getattr(options, name) < least
    ]
    if options.seed >= 2**63:
        problems.append(f"--seed: expected less than 2**63, got {options.seed}")
    problems += [
        f"--size: expected a height and a width of at least 16, got {size}" for size in options.size if min(size) < 16
    ]
    if problems:
        raise InputError(problems)
    for place, name in (("checkpoint", options.checkpoint), *(("--beside", name) for name in options.beside)):
        if not name.startswith(TORCHVISION):
            check_named(place, name, "the folder of a model, a Hub id or torchvision/NAME")
    if options.folder != "shapes":
        check_named("folder", options.folder, "a folder, a parquet file or a Hub data set")
