"""`python -m cankd_hf.export CHECKPOINT`: a student as one file that runs without its Python code."""

import argparse
from collections.abc import Sequence

from cankd_hf.commands import command_parser, exit_code
from cankd_hf.export.checks import FORMATS, check_options

EXAMPLES = """examples:
  python -m cankd_hf.export runs/camvid_seg
  python -m cankd_hf.export runs/camvid_seg/checkpoint-500 --size 512 512 --output /models/camvid
  python -m cankd_hf.export me/my-student --format torch-export --dtype bfloat16 --output my-student.pt2

Written are the model, the preprocessor's configuration and export.json with every number that is printed; nothing is
written before the file has given the outputs of PyTorch, at several batch sizes and image sizes.

exit codes: 0 exported, 2 refused (the message says why), 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    description = "Export a saved student, check it against PyTorch and measure what the compression bought."
    made = command_parser("export", description, EXAMPLES)
    made.add_argument("checkpoint", help="folder of a run or of a checkpoint, or a Hub id")
    made.add_argument("--format", default="onnx", help=f"{' or '.join(FORMATS)} (default: onnx)")
    made.add_argument("--dtype", default="float32", help="float32, float16, or bfloat16 (torch-export only)")
    made.add_argument("--output", metavar="FILE_OR_FOLDER", help="default: CHECKPOINT/onnx, CHECKPOINT/torch-export")
    made.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images (default: preprocessor's)")
    made.add_argument("--batch-size", type=int, default=1, help="of the timed runs (default: 1)")
    made.add_argument("--runs", type=int, default=20, help="timed runs of each form, in turn (default: 20)")
    made.add_argument("--threads", type=int, help="CPU threads of all forms (default: torch's)")
    made.add_argument("--no-latency", action="store_true", help="export and check only")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the timing")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export, once the new one is good")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_args(argv)

    def run() -> int:
        check_options(options)
        from cankd_hf.export import command  # here, so that --help is fast

        return command.run(options)

    return exit_code(run, "nothing was written")
