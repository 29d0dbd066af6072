"""The files of an export: model, metadata, and the lines that run it."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from cankd_hf.errors import InputError
from cankd_hf.export.graph import Traced
from cankd_hf.export.source import Source
from cankd_hf.tasks.export_forms import ExportForm

OPSET = 20
Runner = Callable[[Tensor], list[Tensor]]
PIXEL_VALUES = "[B, 3, H, W] float32, RGB, rescaled to 0..1, then (x - image_mean) / image_std"


def metadata(source: Source, form: ExportForm, dtype: str, size: tuple[int, int], fixed: str | None) -> dict[str, str]:
    """The file's own metadata, every value a string."""
    made = {
        "checkpoint": Path(source.name).name,
        "task": source.task,
        "architecture": type(source.model).__name__,
        "classes": json.dumps(source.classes),
        "dtype": dtype,
        "size": f"fixed to {size[0]} x {size[1]}: {fixed}" if fixed else "any",
        "pixel_values": PIXEL_VALUES,
        **form.outputs,
    }
    for name in ("image_mean", "image_std"):
        if name in source.preprocessor:
            made[name] = json.dumps(source.preprocessor[name])
    return made


def write_onnx(traced: Traced, form: ExportForm, file: Path, facts: dict[str, str]) -> None:
    """Writes and checks an ONNX file, weights beyond 2 GB beside it. Raises InputError if it cannot be converted."""
    import onnx

    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                traced.program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=list(form.outputs),
                verbose=False,
            )
            assert made is not None
            made.model.metadata_props.update(facts)
            made.save(file)
        onnx.checker.check_model(str(file))
    except Exception as error:  # ConversionError, and whatever the checker raises
        lines = [line for line in str(error).splitlines() if "Error" in line] or [str(error)]
        reason = " ".join(lines[0].split())[:250]
        raise InputError(
            f"ONNX: the exporter of torch {torch.__version__} cannot convert this model ({reason}); "
            "--format torch-export may still work"
        ) from error


def write_program(program: ExportedProgram, file: Path, facts: dict[str, str]) -> None:
    """Writes a `.pt2` file with the facts as `cankd.json`.

    Raises:
        InputError: if the program cannot be serialised, for example a size computed by Python's `round`.
    """
    try:
        torch.export.save(program, file, extra_files={"cankd.json": json.dumps(facts)})
    except Exception as error:  # whatever the serialiser raises: it has no class of its own
        last = " ".join(str(error).strip().splitlines()[-1].split())[:200]
        raise InputError(f"torch.export: this program cannot be written to a file ({last})") from error


def onnx_runner(file: Path, threads: int) -> Runner:
    """A session of ONNX Runtime on the CPU as a function of tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:250]
        raise InputError(f"{file.name}: ONNX Runtime does not load it: {reason}") from error
    return lambda images: [
        torch.from_numpy(np.asarray(x)) for x in session.run(None, {"pixel_values": images.numpy()})
    ]


def program_runner(file: Path) -> Runner:
    """A saved program as a function of tensors."""
    module = torch.export.load(file).module()
    return lambda images: list(module(images))


def snippet(file: Path, source: Source, form: ExportForm, size: tuple[int, int]) -> str:
    """Lines that run the model on one image of noise; for ONNX they need only numpy and onnxruntime."""
    mean = source.preprocessor.get("image_mean", [0.0] * 3)
    std = source.preprocessor.get("image_std", [1.0] * 3)
    onnx = file.suffix == ".onnx"
    names = ", ".join(form.outputs) + ("," if len(form.outputs) == 1 else "")
    lines = ["import numpy as np", "import onnxruntime" if onnx else "import torch"]
    lines += [] if onnx else [f"import {name}" for name in form.imports]
    lines += [
        f"mean, std = np.array({list(mean)}), np.array({list(std)})",
        f"image = np.random.default_rng(0).integers(0, 256, ({size[0]}, {size[1]}, 3))  # yours: RGB, 0 to 255",
        "pixel_values = ((image / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)",
    ]
    if onnx:
        lines += [
            f"session = onnxruntime.InferenceSession({str(file)!r}, providers=['CPUExecutionProvider'])",
            f"{names} = session.run(None, {{'pixel_values': pixel_values}})",
        ]
    else:
        lines += [
            f"model = torch.export.load({str(file)!r}).module()",
            f"{names} = model(torch.from_numpy(pixel_values))",
        ]
    lines.append(f"print({', '.join(f'{name}.shape' for name in form.outputs)})")
    return "\n".join(lines)
