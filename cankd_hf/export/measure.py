"""Parameters, operations and latency of teachers, student and files on this machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cankd_hf.benchmark.measure import interleaved
from cankd_hf.export import files
from cankd_hf.export.forms import Form
from cankd_hf.export.source import Source


def machine(threads: int) -> dict[str, Any]:
    """What the times depend on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }


def size_of(model: nn.Module, run: Callable[[Tensor], Any], images: Tensor) -> dict[str, Any]:
    """Parameters, bytes of the weights in float32, and floating point operations of one forward of a batch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(images)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "bytes": 4 * parameters, "flops": counter.get_total_flops()}


def compiled(source: Source, images: Tensor) -> tuple[Form | None, dict[str, Any]]:
    """The student under torch.compile and the seconds of compiling, or None and the reason it failed."""
    torch._dynamo.reset()
    run = torch.compile(source.model)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            run(pixel_values=images)
    except Exception as error:  # whatever the compiler raises; the export does not need it
        return None, {"failed": files.one_line(error)}
    seconds = time.perf_counter() - start
    return Form("student, torch.compile", lambda given: run(pixel_values=given)), {"compile_seconds": seconds}


@torch.no_grad()
def latency(forms: list[Form], images: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each form, measured in turn after two warm-ups."""
    runs = [lambda run=form.run: run(images) for form in forms]
    for run in runs:  # a second warm-up
        run()
    found = {}
    for form, seconds in zip(forms, interleaved(runs, repeats, torch.device("cpu")), strict=True):
        ordered = sorted(1000 * value for value in seconds)
        low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
        found[form.name] = {"median_ms": statistics.median(ordered), "q1_ms": low, "q3_ms": high}
    return found
