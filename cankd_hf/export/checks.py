"""Checks of the options, before anything heavy is imported."""

import argparse
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from cankd_hf.config.named import check_named
from cankd_hf.errors import InputError

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
# Types of the numbers in a file -> what its name ends in where several are written.
DTYPES = {"float32": "", "float16": "_fp16", "bfloat16": "_bf16", "int8": "_int8"}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NEEDED = ("onnx", "onnxruntime", "onnxscript")
REPORT_FILE, TABLE_FILE = "export.json", "export.md"
LEAST_IMAGES, IMAGES = 8, 128  # of a calibration: the fewest, and how many it takes by default


def check_options(options: argparse.Namespace) -> None:
    """Checks the options, and writes the types of numbers in full, each once, in the order of `DTYPES`.

    Raises:
        InputError: for invalid options, naming the option and what it takes.
    """
    if options.format not in FORMATS:
        raise InputError(f"--format: expected {' or '.join(FORMATS)}, got {options.format!r}")
    _check_dtypes(options)
    for name in ("batch_size", "runs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.size is not None and min(options.size) < 32:
        raise InputError(f"--size: expected at least 32 x 32, got {options.size[0]} x {options.size[1]}")
    absent = [name for name in NEEDED if find_spec(name) is None]
    if options.format == "onnx" and absent:
        raise InputError(f"--format onnx needs {', '.join(absent)}: pip install {' '.join(absent)}")
    if problems := list(_of_images(options)):
        raise InputError(problems)
    targets(options)
    check_named(options.checkpoint, options.checkpoint, "a saved student")


def _check_dtypes(options: argparse.Namespace) -> None:
    given = [options.dtype] if isinstance(options.dtype, str) else options.dtype
    named = [SHORT.get(name, name) for name in given]
    if not named:
        raise InputError(f"--dtype: expected one of {', '.join(DTYPES)}, got none")
    for name, told in zip(named, given, strict=True):
        if name not in DTYPES:
            raise InputError(f"--dtype: expected one of {', '.join(DTYPES)}, got {told!r}")
    if options.format == "onnx" and "bfloat16" in named:
        raise InputError(
            "--dtype: ONNX Runtime has no bfloat16 convolutions on a CPU; use float16, or --format torch-export"
        )
    if options.format != "onnx" and "int8" in named:
        raise InputError(
            f"--dtype: int8 is written as ONNX only, got --format {options.format}; leave one of them out"
        )
    options.dtype = [name for name in DTYPES if name in named]


def _of_images(options: argparse.Namespace) -> Iterator[str]:
    """Problems with the options about images, which have no effect where none are read."""
    quantised = "int8" in options.dtype
    if options.calibration_images is not None and options.calibration_images < LEAST_IMAGES:
        yield f"--calibration-images: expected at least {LEAST_IMAGES}, got {options.calibration_images}"
    for name in ("calibrate", "calibration_images"):
        if getattr(options, name) is not None and not quantised:
            yield f"--{name.replace('_', '-')}: only int8 is calibrated; add it to --dtype, or leave this out"
    if options.calibrate is not None and not Path(options.calibrate).is_dir():
        yield f"--calibrate: expected a folder of images, got {options.calibrate}, which is none; check the path"
    if options.compile and options.no_latency:
        yield "--no-latency: contradicts --compile, which is timed; leave one of them out"
    if options.split is not None and options.no_scores:
        yield f"--no-scores: contradicts --split {options.split}; leave one of them out"
    unread = [] if scores_wanted(options) or (quantised and options.calibrate is None) else options.overrides
    if quantised:  # images to calibrate on are read as the other settings say
        unread = [override for override in unread if override.startswith("data.path")]
    if unread:
        yield f"{unread[0]}: no data set is read for this export; add --split test, or leave it out"


def scores_wanted(options: argparse.Namespace) -> bool:
    """Whether the forms are scored: if a split is named, or rounding may cost accuracy."""
    return not options.no_scores and (options.split is not None or options.dtype != ["float32"])


def targets(options: argparse.Namespace) -> dict[str, Path]:
    """The file of each type. Raises InputError if one exists without --overwrite, or its folder is a file."""
    suffix = FORMATS[options.format]
    if options.output is None:
        local = Path(options.checkpoint)
        base = local if local.is_dir() else Path(local.name)
        file = base / options.format / f"model{suffix}"
    else:
        given = Path(options.output)
        other = [value for value in FORMATS.values() if value != suffix]
        if given.suffix in other:
            raise InputError(f"--output: {given.name} does not end in {suffix}, as a file of {options.format} does")
        file = given if given.suffix == suffix else given / f"model{suffix}"
    if file.parent.exists() and not file.parent.is_dir():
        raise InputError(f"--output: {file.parent} is not a folder")
    several = len(options.dtype) > 1
    files = {name: file.with_stem(file.stem + DTYPES[name]) if several else file for name in options.dtype}
    for present in (*files.values(), file.parent / REPORT_FILE, file.parent / TABLE_FILE):
        if present.exists() and not options.overwrite:
            raise InputError(f"{present}: exists already; name another --output, or replace it with --overwrite")
    return files
