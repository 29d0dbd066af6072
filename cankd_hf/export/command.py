"""The steps of the command: load, trace, write to a temporary folder, check, move into place, measure, print."""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from cankd_hf.benchmark.measure import interleaved, table
from cankd_hf.commands import console as plain_console
from cankd_hf.errors import InputError
from cankd_hf.export import files
from cankd_hf.export.checks import targets
from cankd_hf.export.compare import accepted, compare, problem
from cankd_hf.export.files import Traced, onnx_runner, program_runner, trace
from cankd_hf.export.source import Source, load, teacher_of
from cankd_hf.json_text import to_json
from cankd_hf.tasks.export_forms import Compared, ExportForm

REPORT_FILE = "export.json"


def run(options: argparse.Namespace) -> int:
    """Exports, checks, measures and prints. Returns the exit code.

    Raises:
        InputError: if the student cannot be exported, or the file's outputs differ from PyTorch's.
    """
    console = plain_console(110)
    file = targets(options)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    disable_progress_bar()  # of loading weights
    source = load(options.checkpoint)
    size = tuple(options.size) if options.size else source.size()
    if not accepted(source, [size]):
        raise InputError(f"--size: the student does not take images of {size[0]} x {size[1]}; try multiples of 32")
    form = source.form()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as folder:
        aside = Path(folder) / file.name
        traced, results, facts = _write_checked(source, form, size, options, aside, threads)
        report: dict[str, Any] = {
            **facts,
            "format": options.format,
            "file": file.name,
            "size": list(size),
            "dynamic": ["batch"] if traced.fixed else ["batch", "height", "width"],
            "fixed_because": traced.fixed,
            "smallest_size": traced.smallest,
            "outputs": list(form.outputs),
            "classes": source.classes,
            "checks": [asdict(result) for result in results],
        }
        report["bytes"] = sum(part.stat().st_size for part in Path(folder).iterdir())
        if not options.no_latency:
            report["measured"] = _measure(source, aside, options, size, threads)
        (Path(folder) / REPORT_FILE).write_text(to_json(report), encoding="utf-8")
        if source.preprocessor:
            text = to_json(source.preprocessor)
            (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == REPORT_FILE):
            part.replace(file.parent / part.name)
    _print(console, report, size)
    console.print(f"{file}: {report['bytes']:,} bytes; all numbers in {file.parent / REPORT_FILE}", soft_wrap=True)
    console.print("Run it with:", highlight=False)
    console.print(files.snippet(file, source, form, size), soft_wrap=True, highlight=False, markup=False)
    return 0


def _write_checked(
    source: Source, form: ExportForm, size: tuple[int, int], options: argparse.Namespace, aside: Path, threads: int
) -> tuple[Traced, list[Compared], dict[str, str]]:
    """Writes a file that matches the student at several sizes, or, where that fails, at one, with the reason."""
    module = form.module
    exact = options.dtype == "float32"
    if not exact:  # a copy: the student itself is the reference
        module = files.Cast(load(source.name).form().module, getattr(torch, options.dtype)).eval()
    height, width = size
    others = accepted(source, [(height + 32, width), (height + 13, width + 37), (width, height)])
    traced = trace(module.eval(), source, size, others)
    while True:
        facts = files.metadata(source, form, options.dtype, size, traced.fixed)
        try:
            for old in aside.parent.iterdir():
                old.unlink()
            if options.format == "onnx":
                files.write_onnx(traced, form, aside, facts)
            else:
                files.write_program(traced.program, aside, facts)
            runner = _runner(aside, threads)
            shapes = [(1, *size), (3, *size)]
            if traced.fixed is None:
                shapes += [(2 - index % 2, *other) for index, other in enumerate(others)]
            results = compare(source, form, runner, shapes, exact)
            wrong = [problem(result) for result in results if not result.passed]
        except InputError as error:
            if traced.fixed is not None:
                raise
            results, wrong = [], error.problems
        if not wrong:
            return traced, results, facts
        here = [result for result in results if tuple(result.shape[-2:]) == size and not result.passed]
        if traced.fixed is not None or here:  # wrong at the traced size itself: another size does not help
            raise InputError([f"{source.name}: the exported file does not give what PyTorch gives", *wrong])
        reason = f"{options.format} of this model does not serve every size ({wrong[0]})"
        traced = trace(module, source, size, [], fixed=reason)


def _runner(file: Path, threads: int) -> files.Runner:
    return onnx_runner(file, threads) if file.suffix == ".onnx" else program_runner(file)


def _measure(
    source: Source, file: Path, options: argparse.Namespace, size: tuple[int, int], threads: int
) -> dict[str, Any]:
    """Parameters, bytes, operations and latency of teacher, student and file on this machine."""
    images = torch.randn(options.batch_size, 3, *size)
    model = source.model
    exported = _runner(file, threads)
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }
    found: dict[str, Any] = {"batch": options.batch_size, "runs": options.runs, "machine": machine}
    found["student"] = _size_of(model, images)
    forms: dict[str, Callable[[], object]] = {}
    teacher, recorded = teacher_of(source)
    if teacher is not None:
        found["teacher"] = _size_of(teacher.model, images)
        forms["teacher, PyTorch"] = lambda: teacher.model(pixel_values=images)
    elif recorded.get("parameters"):
        found["teacher"] = {"parameters": recorded["parameters"], "bytes": 4 * recorded["parameters"]}
    forms["student, PyTorch"] = lambda: model(pixel_values=images)
    if not options.no_compile:
        run_compiled, found["torch.compile"] = _compiled(source, images)
        if run_compiled is not None:
            forms["student, torch.compile"] = run_compiled
    name = "ONNX Runtime" if file.suffix == ".onnx" else "torch.export"
    forms[f"student, {name}, {options.dtype}"] = lambda: exported(images)
    with torch.no_grad():
        for run in forms.values():  # a second warm-up
            run()
        times = interleaved(list(forms.values()), options.runs, torch.device("cpu"))
    found["latency"] = {}
    for name, seconds in zip(forms, times, strict=True):
        ordered = sorted(1000 * value for value in seconds)
        low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
        found["latency"][name] = {"median_ms": statistics.median(ordered), "q1_ms": low, "q3_ms": high}
    return found


def _size_of(model: PreTrainedModel, images: Tensor) -> dict[str, Any]:
    """Parameters, bytes of the weights in float32, and floating point operations of one forward of a batch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=images)
    parameters = model.num_parameters()
    return {"parameters": parameters, "bytes": 4 * parameters, "flops": counter.get_total_flops()}


def _compiled(source: Source, images: Tensor) -> tuple[Callable[[], object] | None, dict[str, Any]]:
    """The student under torch.compile and the seconds of compiling, or None and the reason it failed."""
    torch._dynamo.reset()
    run = torch.compile(source.model)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            run(pixel_values=images)
    except Exception as error:  # whatever the compiler raises; the export does not need it
        return None, {"failed": files.one_line(error)}
    return (lambda: run(pixel_values=images)), {"compile_seconds": time.perf_counter() - start}


def _print(console: Console, report: dict[str, Any], size: tuple[int, int]) -> None:
    rows = []
    for check in report["checks"]:
        batch, _, height, width = check["shape"]
        seen = "-" if check["detections"] is None else str(check["detections"])
        values = (f"{check['difference']:.1e}", f"{check['allowed']:.1e}", seen)
        rows.append((str(batch), f"{height} x {width}", *values))
    columns = ("batch", "height x width", "difference", "allowed", "detections")
    console.print(table("exported file against PyTorch", columns, rows, left=0))
    found = [check["detections"] for check in report["checks"]]
    if any(count is not None for count in found) and not any(found):
        console.print("Nothing was detected in the test images, so the selection of detections was not compared.")
    if report["fixed_because"]:
        console.print(f"Any batch, but only images of {size[0]} x {size[1]}: {report['fixed_because']}", markup=False)
    elif report["smallest_size"]:
        least = "{} x {}".format(*report["smallest_size"])
        console.print(f"Any batch, any size that the student itself takes (torch.export asks for {least} at least).")
    if "measured" in report:
        _print_measured(console, report["measured"], report["bytes"], size)


def _print_measured(console: Console, found: dict[str, Any], size_on_disk: int, size: tuple[int, int]) -> None:
    rows = []
    for name in ("teacher", "student"):
        if name in found:
            one = found[name]
            flops = f"{one['flops'] / 1e9:.2f}" if "flops" in one else "-"
            rows.append((f"{name}, float32", f"{one['parameters']:,}", f"{one['bytes']:,}", flops))
    rows.append(("exported file", "", f"{size_on_disk:,}", ""))
    console.print(table("size", ("model", "parameters", "bytes", "GFLOPs a batch"), rows))
    about = found["machine"]
    title = (
        f"latency, batch {found['batch']} x 3 x {size[0]} x {size[1]}, median of {found['runs']} in turn, "
        f"{about['threads']} thread(s) of {about['cores']} cores ({about['processor']}), load {about['load']}"
    )
    first = next(iter(found["latency"].values()))["median_ms"]
    rows = [
        (name, f"{one['median_ms']:.1f}", f"{one['q1_ms']:.1f}-{one['q3_ms']:.1f}", f"{first / one['median_ms']:.2f}x")
        for name, one in found["latency"].items()
    ]
    console.print(table(title, ("form", "ms", "quartiles", "faster than the first"), rows))
    compiling = found.get("torch.compile", {})
    if "failed" in compiling:
        console.print(f"torch.compile failed: {compiling['failed']}", markup=False)
    elif compiling:
        console.print(f"torch.compile took {compiling['compile_seconds']:.1f} s, once.")
