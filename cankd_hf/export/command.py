"""The steps of the command: load, open data, write and check each file aside, measure, move into place, print."""

import argparse
import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from cankd_hf.commands import console as plain_console
from cankd_hf.errors import InputError
from cankd_hf.export import files, tables
from cankd_hf.export.checks import DTYPES, REPORT_FILE, TABLE_FILE, targets
from cankd_hf.export.compare import accepted, compare, problem
from cankd_hf.export.files import onnx_runner, program_runner, trace
from cankd_hf.export.images import calibrating, digests
from cankd_hf.export.job import Job, Written, open_inputs
from cankd_hf.export.quantize import write_int8
from cankd_hf.export.report import made_report
from cankd_hf.export.source import load
from cankd_hf.host import Host
from cankd_hf.hub.files import read_json
from cankd_hf.json_text import to_json
from cankd_hf.runs.threads import settle_threads

HELPER = "exact.onnx"  # the float32 file that int8 is made from, where it is not asked for


def run(options: argparse.Namespace, host: Host) -> int:
    """Exports, checks, measures and prints. Returns the exit code.

    Args:
        options: of the command line.
        host: what this process finds.

    Raises:
        InputError: if the student cannot be exported, data cannot be read, or a file's outputs differ from PyTorch's.
    """
    console = plain_console(140)
    places = targets(options)
    target = next(iter(places.values())).parent
    before = read_json(target / REPORT_FILE).get("files", [])
    stale = {Path(str(name)).name for file in before for name in file["parts"]}
    if options.threads:
        torch.set_num_threads(options.threads)
        host = replace(host, asked=f"--threads {options.threads}")
    console.print(settle_threads(host), soft_wrap=True)
    threads = torch.get_num_threads()
    disable_progress_bar()  # of loading weights
    source = load(options.checkpoint)
    size = (options.size[0], options.size[1]) if options.size else source.size()
    if not accepted(source, [size]):
        raise InputError(f"--size: the student does not take images of {size[0]} x {size[1]}; try multiples of 32")
    job = Job(source, source.form(), size, options, threads, open_inputs(source, options))
    console.print("Exporting ...", highlight=False)
    with _folder(target), tempfile.TemporaryDirectory(dir=target, prefix=".export-") as folder:
        written = list(_write_all(job, Path(folder), places))
        report = made_report(job, written, [_runner(one.file, threads) for one in written])
        beside = {TABLE_FILE: tables.markdown(report), REPORT_FILE: to_json(report)}
        if source.preprocessor:
            beside = {"preprocessor_config.json": to_json(source.preprocessor), **beside}
        _move(written, beside, Path(folder), target, stale)
    tables.print_all(console, report)
    for place in places.values():
        console.print(f"{place}: {report['file_bytes'][place.name]:,} bytes", soft_wrap=True)
    console.print(f"All numbers: {target / REPORT_FILE}; the table for a card: {target / TABLE_FILE}", soft_wrap=True)
    console.print("Run it with:", highlight=False)
    snippet = files.snippet(next(iter(places.values())), source, job.form, size)
    console.print(snippet, soft_wrap=True, highlight=False, markup=False)
    return 0


@contextlib.contextmanager
def _folder(target: Path) -> Iterator[None]:
    """Makes a folder, and removes it and the parents it made if it is still empty at the end.

    Raises:
        InputError: if it cannot be made or written to.
    """
    made = [place for place in (target, *target.parents) if not place.exists()]
    try:
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target):
                pass
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(f"--output: {target} cannot be written to ({reason}); name another folder") from error
        yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it holds the export
                place.rmdir()


def _move(written: list[Written], beside: dict[str, str], folder: Path, target: Path, stale: set[str]) -> None:
    """Puts new files in place, the report last; of the `stale` ones of an earlier export none is left."""
    parts = [part for one in written for part in one.parts]
    for name, text in beside.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in stale - {part.name for part in parts}:
        (target / name).unlink(missing_ok=True)
    for part in (*parts, *(folder / name for name in beside)):
        part.replace(target / part.name)


def _write_all(job: Job, folder: Path, places: dict[str, Path]) -> Iterator[Written]:
    """Each file in a folder of its own; int8 is made from the float32 one, which then is not always kept."""
    exact: Written | None = None
    for dtype in DTYPES:
        helps = dtype == "float32" and "int8" in places
        if dtype not in places and not helps:
            continue
        aside = folder / dtype / (places[dtype].name if dtype in places else HELPER)
        aside.parent.mkdir()
        if dtype == "int8":
            assert exact is not None
            yield _write_int8(job, exact, aside)
            continue
        made = _write_checked(job, dtype, aside)
        exact = made if helps else exact
        if dtype in places:
            yield made


def _write_int8(job: Job, exact: Written, aside: Path) -> Written:
    """Quantizes the float32 file, and checks that it runs wherever that one does, with outputs of its shapes."""
    inputs = job.inputs
    assert inputs.calibration is not None
    if exact.traced.fixed is not None:
        inputs.resize(job.size)
    apart = digests(inputs.scored) if inputs.scored is not None else set()
    facts = {**exact.facts, "dtype": "int8"}
    inputs.used = write_int8(exact.file, calibrating(inputs.calibration, inputs.count, apart), aside, facts)
    shapes = [(check.shape[0], check.shape[2], check.shape[3]) for check in exact.checks]
    results = compare(job.source, job.form, _runner(aside, job.threads), shapes, exact=False)
    for result in results:
        result.allowed = math.inf  # the ranges are not those of noise: the table has the distance on images
        result.passed = result.error is None and math.isfinite(result.difference)
    if wrong := [problem(result) for result in results if not result.passed]:
        raise InputError([f"{job.source.name}: the int8 file does not run as the float32 one does", *wrong])
    return Written("int8", aside, exact.traced, results, facts)


def _write_checked(job: Job, dtype: str, aside: Path) -> Written:
    """Writes a file that matches the student at several sizes, or, where that fails, at one, with the reason."""
    source, form, size, format = job.source, job.form, job.size, job.options.format
    module = form.module
    exact = dtype == "float32"
    if not exact:  # a copy: the student itself is the reference
        module = files.Cast(load(source.name).form().module, getattr(torch, dtype)).eval()
    height, width = size
    others = accepted(source, [(height + 32, width), (height + 13, width + 37), (width, height)])
    traced = trace(module.eval(), source, size, others)
    while True:
        facts = files.metadata(source, form, dtype, size, traced.fixed)
        try:
            for old in aside.parent.iterdir():
                old.unlink()
            if format == "onnx":
                files.write_onnx(traced, form, aside, facts)
            else:
                files.write_program(traced.program, aside, facts)
            runner = _runner(aside, job.threads)
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
            return Written(dtype, aside, traced, results, facts)
        here = [result for result in results if tuple(result.shape[-2:]) == size and not result.passed]
        if traced.fixed is not None or here:  # wrong at the traced size itself: another size does not help
            raise InputError([f"{source.name}: the exported file does not give what PyTorch gives", *wrong])
        reason = f"{format} of this model does not serve every size ({wrong[0]})"
        traced = trace(module, source, size, [], fixed=reason)


def _runner(file: Path, threads: int) -> files.Runner:
    return onnx_runner(file, threads) if file.suffix == ".onnx" else program_runner(file)
