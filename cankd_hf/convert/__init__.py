"""`python -m cankd_hf.convert FILE --as KIND OUT`: weights of OpenMMLab as a folder that `from_pretrained` loads."""

import argparse
from collections.abc import Sequence

from cankd_hf.commands import command_parser, exit_code

EXAMPLES = """examples:
  python -m cankd_hf.convert retinanet_r101_fpn_2x_coco.pth --as retinanet teachers/retinanet_r101
  python -m cankd_hf.convert fcos_r101_caffe_2x.pth --as fcos --style caffe teachers/fcos_r101
  python -m cankd_hf.convert pspnet_r101-d8_80k_cityscapes.pth --as pspnet teachers/psp_r101
  python -m cankd_hf.convert checkpoint0011_4scale.pth --as dino teachers/dino_r50
  python -m cankd_hf.convert epoch_24.pth --as faster_rcnn --labels labels.json students/faster_rcnn_r50

Then teacher.model=teachers/retinanet_r101 in a recipe. docs/convert.md says which files, and what was checked.

exit codes: 0 written, 2 bad input (the message says what)"""
KINDS = ("retinanet", "fcos", "faster_rcnn", "cascade_rcnn", "reppoints", "pspnet", "deeplabv3", "dino")


def parser() -> argparse.ArgumentParser:
    """The command line; imports nothing heavy."""
    made = command_parser(
        "convert", "Convert a .pth file of OpenMMLab to a folder that from_pretrained loads.", EXAMPLES
    )
    made.add_argument(
        "file",
        help="checkpoint of MMDetection 2.x or 3.x, MMSegmentation, MMRazor, the authors' toolbox or DINO's authors",
    )
    made.add_argument("--as", dest="kind", required=True, choices=KINDS, help="which model it is")
    made.add_argument("output", help="folder to write, new or empty")
    made.add_argument(
        "--style",
        choices=["auto", "pytorch", "caffe"],
        default="auto",
        help="of the backbone: stride in the 3x3 (pytorch) or in the first 1x1 convolution (caffe) of a block, and "
        "images in RGB with mean and deviation, or in BGR with the mean alone (default: as the file says)",
    )
    made.add_argument("--labels", metavar="FILE", help="class names, for a file without: json, or a name a line")
    made.add_argument("--part", choices=["student", "teacher"], default="student", help="of a distiller's file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    options = parser().parse_args(argv)

    def run() -> int:
        from cankd_hf.convert import command  # here, so that --help is fast

        return command.run(options)

    return exit_code(run)
