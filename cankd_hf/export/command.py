"""The command's steps: load, trace, write aside, check, move into place, measure, print."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from cankd_hf.errors import InputError
from cankd_hf.export.checks import targets
from cankd_hf.export.compare import accepted, compare, other_sizes, problem, shapes
from cankd_hf.export.files import Runner, metadata, onnx_runner, program_runner, snippet, write_onnx, write_program
from cankd_hf.export.graph import Cast, Traced, trace
from cankd_hf.export.latency import compiled, latencies, machine, size_of
from cankd_hf.export.source import Source, load, teacher_of
from cankd_hf.tasks.export_forms import Compared, ExportForm

REPORT_FILE = "export.json"


def run(options: argparse.Namespace) -> int:
    """Exports, checks, measures and prints. Returns the exit code.

    Raises:
        InputError: where the student cannot be exported, or the file does not give what PyTorch gives.
    """
    console = Console(width=None if os.isatty(1) else 110)
    file = targets(options)
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    disable_progress_bar()  # of loading weights
    source = load(options.checkpoint)
    size = tuple(options.size) if options.size else source.size()
    if not accepted(source, [size]):
        raise InputError(
            f"--size: the student itself does not take images of {size[0]} x {size[1]}; try multiples of 32"
        )
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
        (Path(folder) / REPORT_FILE).write_text(json.dumps(report, indent=2), encoding="utf-8")
        if source.preprocessor:
            text = json.dumps(source.preprocessor, indent=2)
            (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")
        for part in sorted(Path(folder).iterdir(), key=lambda part: part.name == REPORT_FILE):
            part.replace(file.parent / part.name)
    _print(console, report, source, file, size, form)
    return 0


def _write_checked(
    source: Source, form: ExportForm, size: tuple[int, int], options: argparse.Namespace, aside: Path, threads: int
) -> tuple[Traced, list[Compared], dict[str, str]]:
    """The file, which gives what the student gives; at one size only where it must be, with the reason."""
    module = form.module
    exact = options.dtype == "float32"
    if not exact:  # a copy: the student itself stays as it is, to be compared with
        module = Cast(load(source.name).form().module, getattr(torch, options.dtype)).eval()
    others = accepted(source, other_sizes(size))
    traced = trace(module.eval(), source, size, others)
    while True:
        facts = metadata(source, form, options.dtype, size, traced.fixed)
        try:
            runner = _write(traced, form, aside, facts, options.format, threads)
            results = compare(source, form, runner, shapes(size, others if traced.fixed is None else []), exact)
            wrong = [problem(result) for result in results if not result.passed]
        except InputError as error:
            if traced.fixed is not None:
                raise
            results, wrong = [], error.problems
        if not wrong:
            return traced, results, facts
        here = [result for result in results if tuple(result.shape[-2:]) == size and not result.passed]
        if traced.fixed is not None or here:  # at the traced size itself: the size is not what is wrong
            raise InputError([f"{source.name}: the exported file does not give what PyTorch gives", *wrong])
        reason = f"{options.format} of this model does not serve every size ({wrong[0]})"
        traced = trace(module, source, size, [], fixed=reason)


def _write(traced: Traced, form: ExportForm, file: Path, facts: dict[str, str], format: str, threads: int) -> Runner:
    for old in file.parent.iterdir():
        old.unlink()
    if format == "onnx":
        write_onnx(traced, form, file, facts)
        return onnx_runner(file, threads)
    write_program(traced.program, file, facts)
    return program_runner(file)


def _measure(
    source: Source, file: Path, options: argparse.Namespace, size: tuple[int, int], threads: int
) -> dict[str, Any]:
    images = torch.randn(options.batch_size, 3, *size)
    model = source.model
    exported = onnx_runner(file, threads) if file.suffix == ".onnx" else program_runner(file)
    found: dict[str, Any] = {"batch": options.batch_size, "runs": options.runs, "machine": machine(threads)}
    found["student"] = size_of(model, images)
    forms: dict[str, Any] = {}
    teacher, recorded = teacher_of(source)
    if teacher is not None:
        found["teacher"] = size_of(teacher.model, images)
        forms["teacher, PyTorch"] = lambda: teacher.model(pixel_values=images)
    elif recorded.get("parameters"):
        found["teacher"] = {"parameters": recorded["parameters"], "bytes": 4 * recorded["parameters"]}
    forms["student, PyTorch"] = lambda: model(pixel_values=images)
    if not options.no_compile:
        run_compiled, found["torch.compile"] = compiled(source, images)
        if run_compiled is not None:
            forms["student, torch.compile"] = run_compiled
    name = "ONNX Runtime" if file.suffix == ".onnx" else "torch.export"
    forms[f"student, {name}, {options.dtype}"] = lambda: exported(images)
    found["latency"] = latencies(forms, options.runs)
    return found


def _print(
    console: Console, report: dict[str, Any], source: Source, file: Path, size: tuple[int, int], form: ExportForm
) -> None:
    checks = Table(title="exported file against PyTorch", title_justify="left")
    for name in ("batch", "height x width", "difference", "allowed", "detections"):
        checks.add_column(name, justify="right")
    for check in report["checks"]:
        batch, _, height, width = check["shape"]
        seen = "-" if check["detections"] is None else str(check["detections"])
        checks.add_row(
            str(batch), f"{height} x {width}", f"{check['difference']:.1e}", f"{check['allowed']:.1e}", seen
        )
    console.print(checks)
    if any(check["detections"] is not None for check in report["checks"]) and not any(
        check["detections"] for check in report["checks"]
    ):
        console.print("Nothing was detected in the test images, so the selection of detections was not compared.")
    if report["fixed_because"]:
        console.print(f"Any batch, but only images of {size[0]} x {size[1]}: {report['fixed_because']}", markup=False)
    elif report["smallest_size"]:
        least = "{} x {}".format(*report["smallest_size"])
        console.print(f"Any batch, any size that the student itself takes (torch.export asks for {least} at least).")
    if "measured" in report:
        _print_measured(console, report["measured"], report["bytes"], size)
    console.print(f"{file}: {report['bytes']:,} bytes; all numbers in {file.parent / REPORT_FILE}", soft_wrap=True)
    console.print("Run it with:", highlight=False)
    console.print(snippet(file, source, form, size), soft_wrap=True, highlight=False, markup=False)


def _print_measured(console: Console, found: dict[str, Any], size_on_disk: int, size: tuple[int, int]) -> None:
    about = found["machine"]
    sizes = Table(title="size", title_justify="left")
    for name in ("model", "parameters", "bytes", "GFLOPs a batch"):
        sizes.add_column(name, justify="left" if name == "model" else "right")
    for name in ("teacher", "student"):
        if name in found:
            one = found[name]
            flops = f"{one['flops'] / 1e9:.2f}" if "flops" in one else "-"
            sizes.add_row(f"{name}, float32", f"{one['parameters']:,}", f"{one['bytes']:,}", flops)
    sizes.add_row("exported file", "", f"{size_on_disk:,}", "")
    console.print(sizes)
    title = (
        f"latency, batch {found['batch']} x 3 x {size[0]} x {size[1]}, median of {found['runs']} in turn, "
        f"{about['threads']} thread(s) of {about['cores']} cores ({about['processor']}), load {about['load']}"
    )
    times = Table(title=title, title_justify="left")
    for name in ("form", "ms", "quartiles", "faster than the first"):
        times.add_column(name, justify="left" if name == "form" else "right")
    first = next(iter(found["latency"].values()))["median_ms"]
    for name, one in found["latency"].items():
        spread = f"{one['q1_ms']:.1f}-{one['q3_ms']:.1f}"
        times.add_row(name, f"{one['median_ms']:.1f}", spread, f"{first / one['median_ms']:.2f}x")
    console.print(times)
    compiling = found.get("torch.compile", {})
    if "failed" in compiling:
        console.print(f"torch.compile failed: {compiling['failed']}", markup=False)
    elif compiling:
        console.print(f"torch.compile took {compiling['compile_seconds']:.1f} s, once.")
