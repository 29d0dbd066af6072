"""Checks of the options, before anything heavy is imported."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from cankd_hf.errors import InputError

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
DTYPES = ("float32", "float16", "bfloat16")
NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_options(options: argparse.Namespace) -> None:
    """Raises InputError for invalid options, naming the option and what it takes."""
    if options.format not in FORMATS:
        raise InputError(f"--format: expected {' or '.join(FORMATS)}, got {options.format!r}")
    if options.dtype not in DTYPES:
        raise InputError(f"--dtype: expected one of {', '.join(DTYPES)}, got {options.dtype!r}")
    if options.format == "onnx" and options.dtype == "bfloat16":
        raise InputError(
            "--dtype: ONNX Runtime has no bfloat16 convolutions on a CPU; use float16, or --format torch-export"
        )
    for name in ("batch_size", "runs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.size is not None and min(options.size) < 32:
        raise InputError(f"--size: expected at least 32 x 32, got {options.size[0]} x {options.size[1]}")
    absent = [name for name in NEEDED if find_spec(name) is None]
    if options.format == "onnx" and absent:
        raise InputError(f'--format onnx needs {", ".join(absent)}: pip install "cankd-hf[export]"')
    targets(options)


def targets(options: argparse.Namespace) -> Path:
    """The model's file to write. Raises InputError if it exists without --overwrite, or its folder is a file."""
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
    for present in (file, file.parent / "export.json"):
        if present.exists() and not options.overwrite:
            raise InputError(f"{present}: exists already; name another --output, or replace it with --overwrite")
    return file
