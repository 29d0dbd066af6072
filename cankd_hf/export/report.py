"""The report of an export: what was written, scored and measured, as plain data."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cankd_hf.export.files import Runner, one_line
from cankd_hf.export.forms import Form, file_form, score, student_form, teacher_form
from cankd_hf.export.job import Job, Written
from cankd_hf.export.measure import compiled, latency, machine, size_of
from cankd_hf.export.teachers import Known, recorded_parameters, teachers_of

RUNTIMES = {"onnx": "ONNX Runtime", "torch-export": "torch.export"}
SIZES = ("parameters", "bytes", "flops")


def made_report(job: Job, written: list[Written], runners: list[Runner]) -> dict[str, Any]:
    """Scores and measures teachers, student and files. Raises InputError if images cannot be scored."""
    batch = torch.randn(job.options.batch_size, 3, *job.size)
    report, notes = _facts(job, written), []
    if any(one.traced.fixed for one in written):
        job.inputs.resize(job.size)
    if job.inputs.resized:
        notes.append("All images were resized to {} x {}, the only size of the files.".format(*job.inputs.resized))
    known, problems = teachers_of(job.source)
    teachers = {one.name: teacher_form(one) for one in known if _runs(one, batch, problems)}
    student = student_form(job.source, job.form)
    forms = [
        _file_row(job, one, runner, report["files"][index])
        for index, (one, runner) in enumerate(zip(written, runners, strict=True))
    ]
    score(job.source, job.form, [student, *teachers.values(), *forms], job.inputs.scored, job.size)
    for one in known:
        if one.name in teachers:
            teachers[one.name].facts |= size_of(one.model, one.run, batch)
    student.facts |= size_of(job.source.model, student.run, batch)
    rows = [*teachers.values(), student, *forms]
    if not job.options.no_latency:
        report["measured"], rows = _measured(job, teachers, student, forms, batch)
    report["forms"] = [{"form": one.name, **one.facts} for one in rows]
    report["read"] = job.inputs.scored is not None
    report["notes"] = [*notes, *problems, *_unscored(job, known, rows)]
    if job.inputs.scored is not None and job.inputs.scored.task.takes_labels:
        images = job.inputs.scored
        report["scored"] = {
            "split": images.name,
            "metric": images.task.metric,
            "images": student.facts["images"],
            "image_size": images.config.image_size,
        }
    return report


def _facts(job: Job, written: list[Written]) -> dict[str, Any]:
    """What is known of the files before anything is measured; what has one value is that of the first file."""
    first = written[0]
    report: dict[str, Any] = {
        **first.facts,
        "format": job.options.format,
        "file": first.file.name,
        "size": list(job.size),
        "dynamic": ["batch"] if first.traced.fixed else ["batch", "height", "width"],
        "fixed_because": first.traced.fixed,
        "smallest_size": first.traced.smallest,
        "outputs": list(job.form.outputs),
        "classes": job.source.classes,
        "checks": [asdict(result) for result in first.checks],
        "bytes": first.bytes,
        "file_bytes": {one.file.name: one.bytes for one in written},
        "files": [
            {
                "file": one.file.name,
                "dtype": one.dtype,
                "parts": [part.name for part in one.parts],
                "bytes": one.bytes,
                "fixed_because": one.traced.fixed,
                "checks": [asdict(result) for result in one.checks],
            }
            for one in written
        ],
    }
    inputs = job.inputs
    if inputs.not_scored is not None:
        report["not_scored"] = inputs.not_scored
    if inputs.calibration is not None:
        report["calibration"] = {"images": inputs.used, "source": inputs.calibration.name}
    return report


def _file_row(job: Job, written: Written, runner: Runner, facts: dict[str, Any]) -> Form:
    made = file_form(f"student, {RUNTIMES[job.options.format]}, {written.dtype}", runner, job.form)
    made.facts = {key: facts[key] for key in ("file", "dtype", "bytes")}
    return made


def _runs(teacher: Known, batch: Tensor, problems: list[str]) -> bool:
    """Whether a teacher takes the images; else adds the reason to the problems."""
    try:
        with torch.no_grad():
            teacher.run(batch[:1])
    except Exception as error:  # whatever a model of any library raises
        problems.append(f"{teacher.name}: left out, it does not take these images ({one_line(error)}).")
        return False
    return True


def _measured(
    job: Job, teachers: dict[str, Form], student: Form, forms: list[Form], batch: Tensor
) -> tuple[dict[str, Any], list[Form]]:
    """Sizes and latency, and the rows of the table, with torch.compile among them."""
    options = job.options
    found: dict[str, Any] = {"batch": options.batch_size, "runs": options.runs, "machine": machine(job.threads)}
    for name, one in {**teachers, "student": student}.items():
        found[name] = {key: one.facts[key] for key in SIZES}
    if not teachers and (recorded := recorded_parameters(job.source)):
        found["teacher"] = {"parameters": recorded, "bytes": 4 * recorded}
    rows = [*teachers.values(), student, *forms]
    if options.compile:
        quick, found["torch.compile"] = compiled(job.source, batch)
        rows = [*teachers.values(), student, *([] if quick is None else [quick]), *forms]
    found["latency"] = latency(rows, batch, options.runs)
    return found, rows


def _unscored(job: Job, known: list[Known], rows: list[Form]) -> list[str]:
    """Why rows have no score, where others have one."""
    inputs = job.inputs
    if inputs.scored is None:
        return []
    if not inputs.scored.task.takes_labels:
        return ["Students of features are scored by their teacher alone (results.json); here by their distance."]
    lines = [f"{one.name}: not scored, {one.unscored}." for one in known if one.unscored is not None]
    return [*lines, *(str(one.facts["unscored"]) for one in rows if "unscored" in one.facts)]
