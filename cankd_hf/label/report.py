"""The end of a call: metadata, class names, records, `label.json`, the contact sheet, and what is printed."""

import logging
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from cankd_hf.commands import console as plain_console
from cankd_hf.errors import InputError
from cankd_hf.hub.files import read_json
from cankd_hf.json_text import to_json
from cankd_hf.label.folder import Merged
from cankd_hf.label.images import LabelledSet, pictures_of
from cankd_hf.label.predict import Job
from cankd_hf.label.records import Record, content_hash, write
from cankd_hf.label.sheet import PAGE, write_sheet
from cankd_hf.names import LABEL_FILE
from cankd_hf.tasks.labelling import Summary

logger = logging.getLogger(__name__)
LABELS = "labels.json"
ROLES = {"train": "train", "eval": "val", "test": "test"}
COLUMNS = {  # of the printed table
    "threshold": "threshold",
    "confidence": "mean confidence",
    "kept": "kept",
    "share": "share of the labels",
    "prior": "prior",
}


def finish(job: Job, labelled: LabelledSet | None, processes: int) -> None:
    """Writes the data set from the records of all processes, and tells about it.

    Raises:
        InputError: if no image is left.
    """
    known, split, output = job.records.read(), job.output.split, job.output
    records = {one.source: known[one.source] for one in job.images.pictures if one.source in known}
    left_out = {
        record["source"]: job.held[record["picture"]] for record in records.values() if record["picture"] in job.held
    }
    kept = [record for record in records.values() if "facts" in record and record["source"] not in left_out]
    if not kept:
        raise InputError(
            f"{job.options.folder}: expected images to label, got none beside {len(left_out)} that are held out "
            f"({', '.join(f'{a} = {b}' for a, b in list(left_out.items())[:3])})"
        )
    summary = job.labelling.summary([record["facts"] for record in kept])
    corrected = {record["source"] for record in kept if job.records.corrected(record)}
    written = [(record, _line(job, record, number, summary)) for number, record in enumerate(kept, start=1)]
    given = list(_given(job, labelled)) if labelled is not None and job.options.complete else []
    own = {record["source"]: record for record, _ in given}
    for record in own.values():
        record |= {"line": known[record["source"]]["line"]} if "line" in known.get(record["source"], {}) else {}
    merged = Merged()
    for folder in dict.fromkeys([split, *(record["split"] for record in own.values())]):
        lines = [pair for pair in given if pair[0]["split"] == folder]
        gone = [records[source]["file_name"] for source in left_out] if folder == split else []
        found = output.merge(folder, [*(written if folder == split else []), *lines], gone)
        merged = found if folder == split else merged
    for source in left_out:
        output.drop(records[source], job.records.corrected(records[source]))
    for record in kept:
        record["name"] = f"{split}/{record['file_name']}"
    cost = job.records.costs()
    labels = _labels(job)
    report = _report(job, summary, kept, left_out, merged, len(corrected), cost, len(given), processes)
    write(job.records.out / LABEL_FILE, to_json({**report, "labels": labels}).encode())
    job.records.finish([*records.values(), *own.values()], cost)
    write_sheet(job, kept, summary, report)
    _tell(job, report, left_out)


def _line(job: Job, record: Record, number: int, summary: Summary) -> dict[str, Any]:
    """The line of an image in the metadata."""
    folders = {name.split("/")[1]: name.partition("/")[2] for name in record["files"]}
    line = {"file_name": record["file_name"]}
    line |= {key: folders[folder] for key, folder in job.labelling.beside.items() if folder in folders}
    size = (record["size"][0], record["size"][1])
    return {**line, **job.labelling.line(record["facts"], size, number, summary), "confidence": record["confidence"]}


def _given(job: Job, labelled: LabelledSet) -> Iterator[tuple[Record, dict[str, Any]]]:
    """Records and lines of the images of a labelled set, whose files are put beside the others."""
    labelling, number = job.labelling, len(job.images.pictures)
    for role, data in labelled.splits.items():
        folder = ROLES[role] if role != "train" else job.output.split
        for place, picture in enumerate(pictures_of(data.source, data.indices)):
            sample, number = data.raw(place), number + 1
            made, stem = labelling.given(sample.label), f"{folder}/labelled"
            job.output.put_picture(f"{stem}/{picture.file_name}", picture.file, sample.image)
            line: dict[str, Any] = {"file_name": f"labelled/{picture.file_name}"}
            for key, kind in labelling.beside.items():
                if kind in made.files:
                    name = f"{stem}/{kind}/{picture.stem}.png"
                    line[key] = name.partition("/")[2]
                    if not (job.records.out / name).is_file():
                        job.output.put(name, made.files[kind])
            size = (sample.image.shape[-2], sample.image.shape[-1])
            line |= labelling.line(made.facts, size, number, Summary([], {}, [], [], ""))
            yield {"source": f"labelled:{folder}/{picture.source}", "split": folder, "given": True}, line


def _labels(job: Job) -> str:
    """Writes the class names, unless a person has changed them. Returns the hash of what was written."""
    file, report = job.records.out / LABELS, job.records.out / LABEL_FILE
    before = read_json(report).get("labels")
    content = to_json(job.labelling.labels).encode()
    if file.is_file() and before is not None and content_hash(file.read_bytes()) != before:
        return str(before)
    write(file, content)
    return content_hash(content)


def _report(
    job: Job,
    summary: Summary,
    kept: list[Record],
    left_out: dict[str, str],
    merged: Merged,
    corrected: int,
    cost: dict[str, float],
    given: int,
    processes: int,
) -> dict[str, Any]:
    """The content of `label.json`."""
    teacher, options, config = job.teacher, job.options, job.teacher.config
    return {
        "teacher": {
            "model": teacher.name,
            "task": teacher.task.name,
            "class": type(teacher.model).__name__,
            "fingerprint": teacher.fingerprint(),
            "parameters": sum(one.numel() for one in teacher.model.parameters()),
            "image_size": config.image_size,
            "keep_aspect": config.keep_aspect,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
        },
        "images": {
            "source": options.folder,
            "split": options.split,
            "labelled": len(kept),
            "left_out": left_out,
            "not_in": options.not_in,
            "not_read": len(job.images.pictures) - len(kept) - len(left_out),
            "corrected": corrected + merged.corrected,
            "removed": merged.removed,
            "of_the_labelled_set": given,
        },
        "labelled": options.labelled,
        "soft": options.soft,
        "keep": options.keep,
        "unit": summary.unit,
        "classes": summary.classes,
        "confidence": summary.confidence,
        "mean_confidence": round(sum(record["confidence"] for record in kept) / len(kept), 4),
        "warnings": summary.warnings,
        "cost": cost,
        "processes": processes,
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "pillow")},
    }


def table(report: dict[str, Any]) -> list[list[str]]:
    """The table of classes, its heading first."""
    rows = [["class", *COLUMNS.values()]]
    for name, numbers in report["classes"].items():
        rows.append([name, *("-" if numbers[key] is None else f"{numbers[key]:.3g}" for key in COLUMNS)])
    return rows


def _tell(job: Job, report: dict[str, Any], left_out: dict[str, str]) -> None:
    from rich.table import Table

    console, images, out = plain_console(120), report["images"], job.records.out
    said = [f"{images['labelled']} images labelled"]
    if left_out:
        first = next(iter(left_out.items()))
        said.append(f"{len(left_out)} left out, as they are held out elsewhere (first {first[0]} = {first[1]})")
    said += [f"{images['not_read']} skipped"] if images["not_read"] else []
    said += [f"{images['corrected']} corrected by hand, kept as they are"] if images["corrected"] else []
    said += [f"{images['removed']} removed by hand"] if images["removed"] else []
    said += [f"{images['of_the_labelled_set']} of {job.options.labelled}"] if images["of_the_labelled_set"] else []
    heading, *rows = table(report)
    printed = Table(*heading, title=f"{report['unit']} by {job.teacher.name}")
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
    console.print("; ".join(said), soft_wrap=True)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True)
    seconds = ", ".join(f"{value:.0f} {name.replace('_', ' ')}" for name, value in report["cost"].items())
    console.print(f"Cost: {seconds}, charged to each training on it", soft_wrap=True)
    console.print(
        f"Look at {out / PAGE}, correct {out / job.output.split}, then train on data.path={out}", soft_wrap=True
    )
