"""The steps of the command: open teacher and images, label what is not finished, then write the data set."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cankd_hf.commands import console
from cankd_hf.data.common.folders import SPLIT_NAMES, slice_of
from cankd_hf.errors import InputError, together
from cankd_hf.host import Host
from cankd_hf.hub.files import read_json
from cankd_hf.label.folder import Output
from cankd_hf.label.images import LabelledSet, Picture, check_classes, held_out, open_images, open_labelled
from cankd_hf.label.predict import Job, label_all, look
from cankd_hf.label.records import HIDDEN, Record, Records, unchanged, write
from cankd_hf.label.report import finish
from cankd_hf.label.teacher import LabelTeacher, open_teacher
from cankd_hf.names import TORCHVISION
from cankd_hf.runs.threads import settle_threads
from cankd_hf.tasks.labelling import Choices, Labelling
from cankd_hf.training.checkpoint_files import DISK_FULL, check_folder, writing
from cankd_hf.training.lock import FolderLock
from cankd_hf.training.monitoring.cost import CostMeter

PATIENCE = timedelta(days=7)  # for which processes wait for the slowest


def run(options: argparse.Namespace, host: Host) -> int:
    """Labels the images and writes the data set. Returns the exit code.

    Args:
        options: of the command line.
        host: what this process finds.

    Raises:
        InputError: for a teacher without a head, images or sets that cannot be read, or an output of another call.
    """
    meter = CostMeter()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    threads = settle_threads(host, None, options.workers)
    if state.is_main_process:
        console().print(threads, soft_wrap=True)
    out = Path(options.output or f"{Path(options.folder).name or 'images'}-labels")
    names = None
    if options.labelled and options.teacher.startswith(TORCHVISION):
        names = open_labelled(options.labelled, None).names
    teacher, images = together(
        lambda: open_teacher(options.teacher, options.size, options.weights, names), lambda: open_images(options)
    )
    labelled = open_labelled(options.labelled, teacher.task) if options.labelled else None
    labelling = _labelling(options, teacher, labelled)
    if state.is_main_process:
        check_folder(out, "--output")
    with FolderLock(out) if state.is_main_process else nullcontext(), writing(out, DISK_FULL):
        if state.is_main_process:
            _claim(out, options)
        state.wait_for_everyone()
        output, records = Output(out, _split(options), options.link), Records(out, state.process_index)
        held = held_out(images, options, labelled)
        job = Job(options, teacher, labelling, images, held, output, records, state.device, meter)
        _look_first(job, state)
        job.key = key = _key(teacher, labelling, labelling.settings)
        known = records.read()
        todo = [one for one in images.pictures if _is_due(one, known.get(one.source), records, key, held)]
        state.wait_for_everyone()  # all have read the journals that the first one writes on
        label_all(job, todo[state.process_index :: state.num_processes])
        state.wait_for_everyone()
        if state.is_main_process:
            finish(job, labelled, state.num_processes)
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
    return 0


def _labelling(options: argparse.Namespace, teacher: LabelTeacher, labelled: LabelledSet | None) -> Labelling:
    kind, names = teacher.task.labelling(), set(teacher.id2label.values())
    by_name = dict(word.rsplit("=", 1) for word in options.threshold if "=" in word)
    for_all = [word for word in options.threshold if "=" not in word]
    problems = [
        f"--threshold {name}: expected a class of the teacher ({', '.join(sorted(names)[:20])}), got {name!r}"
        for name in by_name.keys() - names
    ]
    if len(for_all) > 1:
        problems.append(f"--threshold: expected one number for all classes, got {', '.join(for_all)}; name classes")
    if options.soft and not kind.takes_soft:
        problems.append("--soft: expected a teacher of masks, got one whose scores are always written; leave it out")
    if options.keep is not None and not kind.takes_soft and labelled is None:
        problems.append("--keep: expected --labelled SET beside it, which says how many boxes to expect; name one")
    if problems:
        raise InputError(problems)
    thresholds = {name: float(value) for name, value in by_name.items()}
    choices = Choices(float(for_all[0]) if for_all else None, thresholds, options.soft, options.keep)
    if labelled is None:
        return kind(teacher.id2label, choices)
    check_classes(labelled, teacher.id2label)
    teacher.id2label = dict(labelled.names)
    labels = labelled.labels()
    made = kind(labelled.names, choices, kind.prior(labels, len(labelled.names)), len(labels))
    made.palette = labelled.palette
    return made


def _split(options: argparse.Namespace) -> str:
    """The folder of the split to write."""
    name = slice_of(options.split, 0)[0]
    split = name if name.lower() in SPLIT_NAMES else "train"
    if options.complete and SPLIT_NAMES[split.lower()] != "train":
        raise InputError(f"--complete: expected a training split to label beside it, got --split {options.split}")
    return split


def _claim(out: Path, options: argparse.Namespace) -> None:
    """Marks the output folder; InputError if it holds anything else, or labels of other images."""
    mark = out / HIDDEN / "source.json"
    if os.path.isdir(options.folder) and out.resolve().is_relative_to(Path(options.folder).resolve()):
        raise InputError(f"--output {out}: expected a folder outside of {options.folder}, whose images are labelled")
    place = os.path.realpath(options.folder) if os.path.exists(options.folder) else options.folder
    now = {"images": place, "split": options.split}
    if mark.is_file():
        then = read_json(mark)
        if then != now:
            differing = [f"{name}: {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
            raise InputError(
                f"--output {out}: holds labels of other images ({'; '.join(differing)}); name another one"
            )
        return
    others = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if others:
        raise InputError(
            f"--output {out}: expected an empty folder, or one that this command wrote, got one with "
            f"{sorted(others)[0]}; name another folder"
        )
    write(mark, json.dumps(now).encode())


def _look_first(job: Job, state: PartialState) -> None:
    """Finds the thresholds that follow from what the teacher says of some images, once for all processes and calls."""
    labelling, file = job.labelling, job.records.out / HIDDEN / "thresholds.json"
    if not labelling.looks_first:
        return
    choices = labelling.choices
    key = _key(job.teacher, labelling, [choices.threshold, choices.keep, choices.soft])
    known = read_json(file)
    if state.is_main_process and known.get("for") != key:
        look(job)
        write(file, json.dumps({"for": key, "seen": labelling.seen_so_far()}).encode())
    state.wait_for_everyone()
    labelling.take(read_json(file)["seen"])


def _key(teacher: LabelTeacher, labelling: Labelling, settings: Sequence[Any]) -> str:
    """What predictions depend on beside the picture."""
    config = teacher.config
    parts = [teacher.fingerprint(), config.image_size, config.keep_aspect, config.image_mean, config.image_std]
    text = json.dumps([*parts, list(settings), sorted(labelling.id2label.items())])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_due(picture: Picture, record: Record | None, records: Records, key: str, held: dict[str, str]) -> bool:
    """Whether a picture is still to be labelled; never one whose label a person has corrected."""
    if record is None:
        return True
    if records.corrected(record):
        return False
    if not unchanged(picture, record):
        return True
    if record["picture"] in held:
        return False
    return "facts" not in record or record["settings"] != key or not records.whole(record)
