"""`python -m cankd_hf.export CHECKPOINT`: a student as files that run without its Python code."""

import argparse
from collections.abc import Sequence

from cankd_hf.commands import command_parser, exit_code
from cankd_hf.export.checks import DTYPES, FORMATS, IMAGES, check_options
from cankd_hf.host import read_host, wait_passively

EXAMPLES = """examples:
  python -m cankd_hf.export runs/camvid_seg
  python -m cankd_hf.export runs/camvid_seg/checkpoint-500 --size 512 512 --output /models/camvid
  python -m cankd_hf.export runs/camvid_seg data.path=/data/camvid --dtype float32 float16 int8 --split test
  python -m cankd_hf.export me/my-student --dtype int8 --calibrate my-images --no-scores
  python -m cankd_hf.export me/my-student --format torch-export --dtype bfloat16 --output my-student.pt2

Written are the models, the preprocessor's configuration, export.json with every number that is printed, and export.md
with the table; nothing is written before each file has run at several batch sizes and image sizes, and has given the
outputs of PyTorch (int8 rounds too much for a limit: its table says how far it is from them).

exit codes: 0 exported, 2 refused (the message says why), 130 interrupted"""


SPLIT_HELP = "score the forms on this split (default: other types than float32 on test, or validation without one)"


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    description = "Export a saved student, check it against PyTorch and measure what the compression bought."
    made = command_parser("export", description, EXAMPLES)
    made.add_argument("checkpoint", help="folder of a run or of a checkpoint, or a Hub id")
    made.add_argument("overrides", nargs="*", metavar="data.key=value", help="where the data are and how to read them")
    made.add_argument("--format", default="onnx", help=f"{' or '.join(FORMATS)} (default: onnx)")
    made.add_argument(
        *("--dtype", "--precision"),
        nargs="+",
        default=["float32"],
        metavar="TYPE",
        help=f"one file for each of {', '.join(DTYPES)} (bfloat16: torch-export only; int8: onnx only)",
    )
    made.add_argument("--output", metavar="FILE_OR_FOLDER", help="default: CHECKPOINT/onnx, CHECKPOINT/torch-export")
    made.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images (default: preprocessor's)")
    made.add_argument("--split", choices=("test", "validation"), help=SPLIT_HELP)
    made.add_argument("--no-scores", action="store_true", help="do not score the forms")
    made.add_argument("--calibrate", metavar="FOLDER", help="int8: images to calibrate on (default: the train split)")
    made.add_argument("--calibration-images", type=int, metavar="N", help=f"int8: how many (default: {IMAGES})")
    made.add_argument("--batch-size", type=int, default=1, help="of the timed runs (default: 1)")
    made.add_argument("--runs", type=int, default=20, help="timed runs of each form, in turn (default: 20)")
    made.add_argument("--threads", type=int, help="CPU threads of all forms (default: as many as find a free core)")
    made.add_argument("--no-latency", action="store_true", help="export and check only")
    compiling = argparse.BooleanOptionalAction
    made.add_argument("--compile", action=compiling, default=False, help="time torch.compile too: takes a minute more")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export, once the new one is good")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_intermixed_args(argv)
    options.overrides += [name for name in options.dtype if "=" in name]  # `--dtype int8 data.path=...`
    options.dtype = [name for name in options.dtype if "=" not in name]

    def run() -> int:
        check_options(options)
        host = read_host()
        wait_passively(host)  # before torch is imported
        from cankd_hf.export import command  # here, so that --help is fast

        return command.run(options, host)

    return exit_code(run, "nothing was written")
