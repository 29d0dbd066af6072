"""Traces a student with torch.export and writes its files: model, metadata, and the lines that run it."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cankd_hf.errors import InputError
from cankd_hf.export.patches import traceable
from cankd_hf.export.source import Source
from cankd_hf.json_text import to_json
from cankd_hf.tasks.export_forms import ExportForm

OPSET = 20
Runner = Callable[[Tensor], list[Tensor]]
PIXEL_VALUES = "[B, 3, H, W] float32, RGB, rescaled to 0..1, then (x - image_mean) / image_std"
# Model types with windows laid out for one size: tracing them for any size takes minutes, and the program takes one.
ONE_SIZE = {"swin", "swinv2", "maskformer-swin", "donut-swin", "swin2sr"}


class Cast(nn.Module):
    """Computes in half precision, with float32 inputs and outputs."""

    def __init__(self, form: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = form.to(dtype), dtype

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:

        outputs = self.form(pixel_values.to(self.dtype))
        return tuple(x.float() if x.is_floating_point() else x for x in outputs)


def _model_types(config: Any) -> set[str]:
    """The model types of a configuration and of the backbone in it."""
    backbone = getattr(config, "backbone_config", None)
    return {config.model_type} | (set() if backbone is None else _model_types(backbone))


@dataclass
class Traced:
    """An exported program; `fixed`: why it takes only one size, None if it takes any; `smallest`: the least size."""

    program: ExportedProgram
    fixed: str | None
    smallest: list[int] | None


def trace(
    form: nn.Module, source: Source, size: tuple[int, int], others: list[tuple[int, int]], fixed: str | None = None
) -> Traced:
    """Traces with dynamic batch and size where possible, else with dynamic batch at one size.

    `others`: further sizes that a dynamic program must take; `fixed`: why only one size is asked for. Raises
    InputError if the form cannot be traced at all.
    """
    reason = fixed
    windows = _model_types(source.model.config) & ONE_SIZE
    if reason is None and windows:
        reason = f"the windows of {windows.pop()} are laid out for one size"
    if reason is None:
        try:
            program = _export(form, size, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC})
            for other in others:
                with torch.no_grad():
                    program.module()(torch.zeros(1, 3, *other))
            return Traced(program, None, _smallest(program))
        except Exception as error:  # whatever torch.export raises: it has no class of its own
            reason = f"torch.export cannot make the size dynamic ({one_line(error)})"
    try:
        return Traced(_export(form, size, {0: Dim.DYNAMIC}), reason, None)
    except Exception as error:
        raise InputError(
            f"{source.name}: torch.export cannot trace {type(source.model).__name__} at {size[0]} x {size[1]}: "
            f"{one_line(error)}; try another --size, or another torch"
        ) from error


def _export(form: nn.Module, size: tuple[int, int], dynamic: dict[int, Any]) -> ExportedProgram:
    with torch.no_grad(), contextlib.redirect_stderr(None), traceable(form):
        return torch.export.export(form, (torch.randn(2, 3, *size),), dynamic_shapes=(dynamic,))


def _smallest(program: ExportedProgram) -> list[int]:
    shape = next(node for node in program.graph.nodes if node.name == "pixel_values").meta["val"].shape
    lower = [program.range_constraints[side.node.expr].lower for side in shape[-2:]]
    return [int(value) for value in lower]


def one_line(error: object) -> str:
    """A message as one line of at most 250 characters."""
    return " ".join(str(error).split())[:250] or type(error).__name__


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
            made[name] = json.dumps(source.preprocessor[name], allow_nan=False)
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
            for node in made.model.graph.all_nodes():
                node.metadata_props.clear()  # traces of the stack, with paths of this machine: a third of a small file
            made.model.metadata_props.update(facts)
            made.save(file)
        onnx.checker.check_model(str(file))
    except Exception as error:  # ConversionError, and whatever the checker raises
        if isinstance(error, OSError) and error.errno:
            raise  # of the disk, not of the model
        lines = [line for line in str(error).splitlines() if "Error" in line] or [str(error)]
        raise InputError(
            f"ONNX: the exporter of torch {torch.__version__} cannot convert this model ({one_line(lines[0])}); "
            "--format torch-export may still work"
        ) from error


def write_program(program: ExportedProgram, file: Path, facts: dict[str, str]) -> None:
    """Writes a `.pt2` file with the facts as `cankd.json`.

    Raises:
        InputError: if the program cannot be serialised, for example a size computed by Python's `round`.
    """
    try:
        torch.export.save(program, file, extra_files={"cankd.json": to_json(facts)})
    except Exception as error:  # whatever the serialiser raises: it has no class of its own
        last = one_line(str(error).strip().splitlines()[-1])
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
        raise InputError(f"{file.name}: ONNX Runtime does not load it: {one_line(error)}") from error
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
