"""Traces the exportable form of a student with torch.export."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cankd_hf.errors import InputError
from cankd_hf.export.source import Source

# Model types with windows laid out for one size: tracing them for any size takes minutes, and the program takes one.
ONE_SIZE = {"swin", "swinv2", "maskformer-swin", "donut-swin", "swin2sr"}


class Cast(nn.Module):
    """Computes in half precision, with float32 inputs and outputs."""

    def __init__(self, form: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.form, self.dtype = form.to(dtype), dtype

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """As the wrapped form."""
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

    Args:
        form: the module.
        source: its student.
        size: height and width to trace at.
        others: further sizes that a dynamic program must take.
        fixed: why only one size is asked for.

    Raises:
        InputError: if it cannot be traced at all.
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
            reason = f"torch.export cannot make the size dynamic ({_line(error)})"
    try:
        return Traced(_export(form, size, {0: Dim.DYNAMIC}), reason, None)
    except Exception as error:
        raise InputError(
            f"{source.name}: torch.export cannot trace {type(source.model).__name__} at {size[0]} x {size[1]}: "
            f"{_line(error)}; try another --size, or another torch"
        ) from error


@contextlib.contextmanager
def _sizes_by_shape(form: nn.Module) -> Iterator[None]:
    """While tracing, `len(tensor)` in the code of transformers is `tensor.shape[0]`.

    Python's own returns a plain number, which makes the batch a constant (RT-DETR).
    """
    names = {type(part).__module__ for part in form.modules()}
    modules = [sys.modules[name] for name in names if name.startswith("transformers.")]
    patched = [module for module in modules if not hasattr(module, "len")]
    for module in patched:
        vars(module)["len"] = lambda value: value.shape[0] if isinstance(value, Tensor) else builtins.len(value)
    try:
        yield
    finally:
        for module in patched:
            del vars(module)["len"]


def _export(form: nn.Module, size: tuple[int, int], dynamic: dict[int, Any]) -> ExportedProgram:
    with torch.no_grad(), contextlib.redirect_stderr(None), _sizes_by_shape(form):
        return torch.export.export(form, (torch.randn(2, 3, *size),), dynamic_shapes=(dynamic,))


def _smallest(program: ExportedProgram) -> list[int]:
    shape = next(node for node in program.graph.nodes if node.name == "pixel_values").meta["val"].shape
    lower = [program.range_constraints[side.node.expr].lower for side in shape[-2:]]
    return [int(value) for value in lower]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
