"""What the compression bought: seconds, parameters, operations and bytes, before and after, on this machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from cankd_hf.benchmark.measure import interleaved
from cankd_hf.export.source import Source


def size_of(model: PreTrainedModel, images: Tensor) -> dict[str, Any]:
    """Parameters, bytes of the weights in float32, and floating point operations of one forward of a batch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=images)
    parameters = model.num_parameters()
    return {"parameters": parameters, "bytes": 4 * parameters, "flops": counter.get_total_flops()}


def machine(threads: int) -> dict[str, Any]:
    """What the times were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }


def compiled(source: Source, images: Tensor) -> tuple[Callable[[], object] | None, dict[str, Any]]:
    """The student under torch.compile, and how long that took; or why it could not be."""
    torch._dynamo.reset()
    run = torch.compile(source.model)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            run(pixel_values=images)
    except Exception as error:  # whatever the compiler raises; the export is good without it
        return None, {"failed": " ".join(str(error).split())[:200]}
    return (lambda: run(pixel_values=images)), {"compile_seconds": time.perf_counter() - start}


def latencies(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each form; they take turns, after two runs each that do not count."""
    with torch.no_grad():
        for run in forms.values():
            run()
        times = interleaved(list(forms.values()), repeats, torch.device("cpu"))
    found = {}
    for name, values in zip(forms, times, strict=True):
        ordered = sorted(1000 * value for value in values)
        low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
        found[name] = {"median_ms": statistics.median(ordered), "q1_ms": low, "q3_ms": high}
    return found
