"""Measures the cost of distillation.

`python -m cankd_hf.benchmark loss | step RECIPE | teacher RECIPE | trainer [RECIPE] | data [FOLDER] | scoring`.
"""

import argparse
import time
from collections.abc import Sequence

from cankd_hf.commands import command_parser, console, exit_code
from cankd_hf.errors import InputError
from cankd_hf.host import keep_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark. Returns the exit code."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    keep_memory()  # as the commands that train do
    # imported here, so that --help is fast
    if args.command == "loss":
        from cankd_hf.benchmark.loss import run

        run(args)
        return 0
    for name in ("repeats", "threads", "steps", "images", "classes", "coco"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name}: expected at least 1, got {value}")
    import torch

    if args.command in ("data", "scoring"):
        torch.set_num_threads(1)
        return _run_material(args)

    from cankd_hf.benchmark.step import run_step, run_teacher
    from cankd_hf.runs.recipe import load_recipe

    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = load_recipe(args.recipe, args.overrides)
    if args.command == "trainer":
        from cankd_hf.benchmark.trainer import run_trainer

        run_trainer(recipe, args.steps, args.repeats, console())
    elif args.command == "step":
        if args.cpu_time and (args.threads != 1 or torch.cuda.is_available()):
            raise InputError("--cpu-time: expected --threads 1 and no GPU, where it is meaningful; add --threads 1")
        run_step(recipe, args.repeats, console(), time.process_time if args.cpu_time else time.perf_counter)
    else:
        run_teacher(recipe, args.repeats, console(), compile=not args.no_compile)
    return 0


def _run_material(args: argparse.Namespace) -> int:
    """The benchmarks that need no recipe."""
    parts = args.size.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) >= 4 for part in parts):
        raise InputError(f"--size: expected HxW of at least 4x4, got {args.size!r}; for example 180x240")
    size = [int(part) for part in parts]
    if args.command == "data" and args.coco:
        from cankd_hf.benchmark.large import run_large

        run_large(args.coco, args.check, console())
        return 0
    if args.command == "data":
        from cankd_hf.benchmark.data import run_data

        run_data(args.folder, size, args.images, args.repeats, console())
        return 0
    import torch

    from cankd_hf.benchmark.scoring import run_scoring
    from cankd_hf.benchmark.scoring_boxes import run_boxes

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device: expected a device of this machine, got cuda without a GPU; use --device cpu")
    run, images, classes = {"masks": (run_scoring, 233, 11), "boxes": (run_boxes, 500, 80)}[args.kind]
    run(args.images or images, args.classes or classes, size, args.repeats, args.device, console())
    return 0


def _parser() -> argparse.ArgumentParser:
    examples = "exit codes: 0 measured, 2 bad input (the message says what), 130 interrupted"
    parser = command_parser("benchmark", __doc__ or "", examples)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="time and memory of the CanKD loss against the published form")
    sizes = "comma-separated HxW or HxWxC (default: 25x42 ... 200x336 at C 256, 64x128x2048)"
    loss.add_argument("--sizes", help=sizes)
    loss.add_argument("--affinities", help="comma-separated affinities (default: all)")
    loss.add_argument("--batch", type=int, default=2, help="images (default: 2)")
    loss.add_argument("--repeats", type=int, default=5, help="timed runs of ours and naive in turn (default: 5)")
    loss.add_argument("--seconds", type=float, default=60.0, help="skip runs longer than this (default: 60)")
    loss.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    cpu_time = "CPU seconds instead of wall-clock, for a machine that others use too (with --threads 1)"
    loss.add_argument("--cpu-time", action="store_true", help=cpu_time)
    loss.add_argument("--busy", type=int, default=0, help="busy processes beside the timed runs (default: 0)")
    loss.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    loss.add_argument("--dtype", default="float32", help="type of the maps: float32, bfloat16, float16, float64")
    loss.add_argument("--quick", action="store_true", help="small sizes, one repeat: does everything run?")
    loss.add_argument("--no-naive", action="store_true", help="leave the published form out")
    loss.add_argument("--compile", action="store_true", help="time torch.compile of ours too (a minute a row)")
    loss.add_argument("--json", help="also write the rows to this file")
    for name, text in (
        ("step", "where the time of one distillation step of a recipe goes"),
        ("teacher", "what early stop, dtype and compiling do for the forward of a recipe's teacher"),
        ("trainer", "a step of the stock Trainer, of ours without and with the recipe's teacher"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "trainer":
            command.add_argument("recipe", nargs="?", default="recipes/quickstart.yaml", help="YAML file")
            command.add_argument("--steps", type=int, default=20, help="of each run (default: 20)")
        else:
            command.add_argument("recipe", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
        command.add_argument("--repeats", type=int, default=5, help="timed turns after one to warm up (default: 5)")
        command.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
        if name == "step":
            command.add_argument("--cpu-time", action="store_true", help=cpu_time)
        else:
            command.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    data = commands.add_parser("data", help="images read and augmented in a CPU second, against a plain pipeline")
    data.add_argument("folder", nargs="?", help="data set with masks (default: drawn images of 360x480)")
    data.add_argument("--size", default="180x240", help="crop of images with masks, HxW (default: 180x240)")
    data.add_argument("--images", type=int, default=64, help="images (default: 64)")
    data.add_argument("--coco", type=int, metavar="N", help="instead: open a generated set like COCO of N images")
    data.add_argument("--check", default="1000", help="with --coco: its data.check (default: 1000)")
    scoring = commands.add_parser("scoring", help="scores from a model's outputs, against the plain form")
    kinds = "masks (against one argmax an image) or boxes (COCO scores, against a loop of records; default: masks)"
    scoring.add_argument("--kind", choices=("masks", "boxes"), default="masks", help=kinds)
    scoring.add_argument("--size", default="360x480", help="size of masks or images, HxW (default: 360x480)")
    scoring.add_argument("--images", type=int, help="masks or images (default: 233 or 500)")
    scoring.add_argument("--classes", type=int, help="classes (default: 11 or 80)")
    scoring.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (default: cpu)")
    for command in (data, scoring):
        command.add_argument("--repeats", type=int, default=5, help="timed turns after one to warm up (default: 5)")
    return parser
