"""`python -m cankd_hf.label TEACHER FOLDER`: a teacher's predictions as a data set that trains like any other."""

import argparse
from collections.abc import Sequence

from cankd_hf.commands import command_parser, exit_code
from cankd_hf.config.named import check_named
from cankd_hf.errors import InputError
from cankd_hf.host import read_host, wait_passively
from cankd_hf.names import TORCHVISION

EXAMPLES = """examples:
  python -m cankd_hf.label runs/camvid_teacher photos --output data/photos
  python -m cankd_hf.label runs/camvid_teacher photos --labelled data/camvid --complete --threshold 0.9 pole=0.6
  python -m cankd_hf.label runs/camvid_teacher photos --soft
  python -m cankd_hf.label runs/bccd_teacher slides --labelled data/bccd
  accelerate launch -m cankd_hf.label runs/camvid_teacher photos

Look at contact.html in the output, correct masks/ or metadata.jsonl where you like, and train on it: data.path=OUTPUT.
The same command goes on where it was stopped, and never overwrites what was corrected.

exit codes: 0 written, 2 bad input (the message says what), 130 interrupted"""
KEPT = "what was finished is kept, and the same command goes on"


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    made = command_parser("label", "Write a teacher's masks or boxes for a folder of images as a data set.", EXAMPLES)
    made.add_argument("teacher", help="folder or Hub id of a model with a head, or torchvision/NAME")
    made.add_argument("folder", help="images: a folder, or any other data set that data.path takes")
    made.add_argument("overrides", nargs="*", metavar="data.key=value", help="how the images are read")
    made.add_argument("--output", metavar="DIR", help="where to write (default: FOLDER-labels, here)")
    made.add_argument("--split", default="train", help="which split to label, and to write (default: train)")
    made.add_argument(
        "--threshold",
        nargs="+",
        action="extend",
        default=[],
        metavar="SCORE",
        help="least confidence, as 0.9 for all classes or NAME=0.6 for one (default: masks 0.95, soft ones 0, boxes "
        "0.5, or with --labelled as many as there are in its images)",
    )
    made.add_argument("--soft", action="store_true", help="masks: also store probabilities, from which training draws")
    made.add_argument("--labelled", metavar="SET", help="labelled set: its shares of classes, and boxes an image")
    made.add_argument(
        "--keep",
        type=float,
        metavar="SHARE",
        help="masks: of each class at least this share of its pixels is kept, at a lower threshold where it takes one "
        "(default: 0.5; 0: one threshold for all); boxes: share of those that --labelled lets expect (default: 1)",
    )
    made.add_argument("--complete", action="store_true", help="put images and labels of --labelled into the output")
    made.add_argument(
        *("--not-in", "--not_in"),
        action="append",
        default=[],
        metavar="SET",
        help="leave out pictures of its validation and test splits; repeatable",
    )
    made.add_argument("--link", action="store_true", help="hard links to the images instead of copies")
    made.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="of the teacher's images (default: its own)"
    )
    made.add_argument("--weights", metavar="FILE", help="of torchvision/NAME, instead of torchvision's own")
    made.add_argument("--batch-size", type=int, default=8, help="images at a time on each device (default: 8)")
    made.add_argument("--workers", type=int, default=2, help="threads that read images (default: 2)")
    made.add_argument("--sheet", type=int, default=24, help="pictures on the contact sheet (default: 24)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    options.overrides += [word for word in options.threshold if word.startswith("data.")]
    options.threshold = [word for word in options.threshold if not word.startswith("data.")]

    def run() -> int:
        check(options)
        host = read_host()
        wait_passively(host)  # before torch is imported
        from cankd_hf.label import command  # here, so that --help is fast

        return command.run(options, host)

    return exit_code(run, KEPT)


def check(options: argparse.Namespace) -> None:
    """Raises InputError with all options that make no sense."""
    problems = [
        f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(options, name)}"
        for name, least in (("batch_size", 1), ("workers", 1), ("sheet", 1))
        if getattr(options, name) < least
    ]
    if options.keep is not None and not 0 <= options.keep <= 1:
        problems.append(f"--keep: expected a share from 0 to 1, got {options.keep}")
    if options.complete and not options.labelled:
        problems.append("--complete: expected --labelled SET beside it, got none; name the labelled set")
    if options.size and min(options.size) < 1:
        problems.append(f"--size: expected a height and a width of at least 1, got {options.size}")
    for word in options.threshold:
        try:
            good = 0 <= float(word.rpartition("=")[2]) <= 1
        except ValueError:
            good = False
        if not good:
            problems.append(f"--threshold: expected a number from 0 to 1, or NAME=NUMBER, got {word!r}")
    if problems:
        raise InputError(problems)
    if not options.teacher.startswith(TORCHVISION):
        check_named("teacher", options.teacher, "the folder of a model, a Hub id or torchvision/NAME")
    for place, name in (("folder", options.folder), ("--labelled", options.labelled)):
        if name not in (None, "shapes"):
            check_named(place, name, "a folder, a parquet file or a Hub data set")
