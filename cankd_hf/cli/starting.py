"""The text of a first recipe: every line says why it is as it is."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cankd_hf.cli.data import readable
from cankd_hf.config.named import absent, hint
from cankd_hf.config.plain_yaml import dump_yaml
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import ImageStats, image_stats, timm_folder_stats, timm_stages
from cankd_hf.models.backbones import timm_source
from cankd_hf.tasks.starting import Starter


@dataclass(frozen=True)
class Size:
    """A student that suits a device.

    Attributes:
        words: the device.
        backbone: of the Hub.
        channels: of the pyramid.
        longest: pixels of the long side of its images.
        statistics: mean and std of its input, where they are not ImageNet's.
    """

    words: str
    backbone: str
    channels: int
    longest: int
    statistics: float | None = None


DEVICES = {
    "phone": Size("a phone", "timm/tf_efficientnet_lite0.in1k", 64, 320, 0.5),
    "cpu": Size("a laptop without a GPU", "microsoft/resnet-18", 96, 384),
    "edge": Size("an edge GPU", "microsoft/resnet-18", 128, 512),
    "server": Size("a server GPU", "microsoft/resnet-50", 256, 640),
}
TEACHERS = {
    "none": "",
    "dinov2-small": "facebook/dinov2-with-registers-small",
    "dinov2-base": "facebook/dinov2-with-registers-base",
}


@dataclass(frozen=True)
class Answers:
    """What the five questions gave, and what follows of the machine.

    Attributes:
        task: name of the task.
        starter: its part of a first recipe.
        data: the section `data:` that was found.
        name: of the set, for the output folder.
        device: a key of `DEVICES`.
        teacher: a key of `TEACHERS`, a folder or a Hub id.
        hours: that training may take.
        gpu: whether it trains on a GPU.
        bf16: whether the machine computes in bf16.
        workers: loading processes.
        steps: optimizer steps; they are measured where `measured` says so.
        measured: whether steps are.
        cached: whether the teacher is stored.
        student: folder or Hub id of its backbone; "": the one of the device.
    """

    task: str
    starter: Starter
    data: Mapping[str, Any]
    name: str
    device: str
    teacher: str
    hours: float
    gpu: bool
    bf16: bool
    workers: int
    steps: int = 1000
    measured: bool = False
    cached: bool = False
    student: str = ""

    @property
    def backbone(self) -> str:
        """The student's backbone."""
        return self.student or DEVICES[self.device].backbone

    @property
    def model(self) -> str:
        """The teacher's model; "" for none."""
        return TEACHERS.get(self.teacher, self.teacher)

    @property
    def pays(self) -> tuple[str, ...]:
        """What is known about when distilling pays, and what to try first where there is a choice."""
        first = "First see what teacher=null brings in the same time, which is more steps."
        return (*self.starter.pays, *([first] if self.model and self.starter.labelled else []))

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return self.starter.batch * (2 if self.gpu else 1)


def check_device(text: str) -> str:
    """A device. Raises InputError for another answer."""
    if text not in DEVICES:
        raise InputError(f"--device: expected one of {', '.join(DEVICES)}, got {text!r}")
    return text


def check_teacher(text: str, starter: Starter | None) -> str:
    """A teacher. Raises InputError for what is none, and for none where nothing else teaches."""
    if os.path.isdir(text) and not os.path.isfile(os.path.join(text, "config.json")):
        raise InputError(f"--teacher: expected a folder with a model and its config.json, got {text}, which has none")
    if text not in TEACHERS and not os.path.isdir(text) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", text):
        known = ", ".join(TEACHERS)
        near = hint(text)
        raise InputError(f"--teacher: expected {known}, a folder that exists or a Hub id, got {text!r}{near}")
    if text not in TEACHERS and (missing := absent(text)):
        raise InputError(f"--teacher: expected a folder or a Hub id, got {text!r}; {missing}")
    if starter is not None and not starter.labelled and text == "none":
        raise InputError("--teacher: this task learns from a teacher alone; name one, such as dinov2-small")
    return text


def check_student(text: str) -> str:
    """The backbone of a student, "" for the device's. Raises InputError for what can be none."""
    if not text:
        return text
    if missing := absent(text):
        raise InputError(f"--student: expected a folder with a model or a Hub id, got {text!r}; {missing}")
    if os.path.lexists(text) and not os.path.isfile(os.path.join(text, "config.json")):
        raise InputError(f"--student: expected a folder with a model and its config.json, got {text}, which has none")
    return text


def check_hours(text: str) -> float:
    """A number of hours. Raises InputError for another answer."""
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours <= 1000:
        raise InputError(f"--hours: expected a number above 0 and at most 1000, got {text}")
    return hours


def recipe_text(answers: Answers) -> str:
    """The recipe as YAML with comments."""
    taught = bool(answers.model)
    parts = [
        [f"# A student for {DEVICES[answers.device].words} that {answers.starter.what}. Written by `cankd init`."],
        ["# What is known about when distilling pays (docs/when.md):", *_comments(answers.pays)],
        ["# Look first: cankd train THIS_FILE --dry-run"],
        [
            _line(f"task: {answers.task}", "by the labels of the data"),
            _line(f"output_dir: {_plain(f'runs/{answers.name}')}", "checkpoints, results, report and pictures"),
            *([_line("baseline: false", _BASELINE)] if taught and answers.starter.labelled else []),
        ],
        _data(answers),
        _student(answers),
        *([_teacher(answers), _distill(answers)] if taught else []),
        _training(answers),
    ]
    return "\n".join(
        "\n".join(part) + ("\n" if number > 2 or number == 2 else "") for number, part in enumerate(parts)
    )


_BASELINE = "true trains the student alone too: the only way to see what the teacher brought"


def _line(text: str, why: str) -> str:
    """A line with its reason behind it, or above it where it is long."""
    if len(text) + len(why) > 112:
        indent = re.match(r"[ -]*", text)
        return f"{' ' * (len(indent[0]) if indent else 0)}# {why}\n{text}"
    return f"{text:<44}  # {why}"


def _comments(sentences: Sequence[str]) -> list[str]:
    return [
        line for one in sentences for line in textwrap.wrap(one, 112, initial_indent="# - ", subsequent_indent="#   ")
    ]


def _plain(value: Any) -> str:
    """A value as YAML on one line."""
    text = readable(dump_yaml([value]).strip().replace("\n ", ""))
    return text[1:-1] if text.startswith("[") else text.removeprefix("- ")


_WHY_DATA = {
    "path": "what `cankd data` looked at",
    "train_split": "trained on",
    "eval_split": "scored during the run",
    "test_split": "scored once, at the end",
    "image_size": "[height, width] of evaluation: the shape of the images, as large as the device allows",
}


def _data(answers: Answers) -> list[str]:
    starter = answers.starter
    settings = dict(answers.data)
    lines = ["data:"]
    lines += [
        _line(f"  {key}: {_plain(value)}", _WHY_DATA.get(key, "found in the data")) for key, value in settings.items()
    ]
    crop = settings["image_size"]
    lines.append(_line(f"  crop_size: {_plain(crop)}", "of training, cut out of the scaled images"))
    lines += [_line(f"  {key}: {value}", why) for key, (value, why) in starter.data.items() if key not in settings]
    lines.append(_line("  color_jitter: 0.2", "mild random colours"))
    lines.append(_line("  on_error: skip", "broken files are left out and counted; stop refuses them"))
    if (expected := _statistics(answers)) is not None:
        mean, std = (_plain([round(value, 6) for value in values]) for values in expected)
        lines.append(_line(f"  image_mean: {mean}", "what the student's pretrained weights expect"))
        lines.append(_line(f"  image_std: {std}", "the same"))
    return lines


def _statistics(answers: Answers) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and std of the images that the student was pretrained on; None for ImageNet's."""
    if not answers.student:
        value = DEVICES[answers.device].statistics
        return None if value is None else ([value] * 3, [value] * 3)
    timm = timm_source(answers.student) is not None and os.path.isdir(answers.student)
    found = timm_folder_stats(answers.student) if timm else image_stats(answers.student)
    return None if (found.mean, found.std) == (ImageStats().mean, ImageStats().std) else (found.mean, found.std)


def _student(answers: Answers) -> list[str]:
    size, starter = DEVICES[answers.device], answers.starter
    named, why = _plain(answers.backbone), "your own" if answers.student else f"pretrained, of a size for {size.words}"
    if starter.outputs:
        backbone = f"{{pretrained: {named}, out_indices: {list(starter.outputs)}}}"
        return ["student:", _line(f"  backbone: {backbone}", f"{why}; its two deep stages, strides 16 and 32")]
    head = ", ".join(f"{key}: {value.format(channels=size.channels)}" for key, value in starter.head.items())
    stages = [1, 2, 3, 4]  # of the devices' timm models
    if answers.student and (timm := timm_source(answers.student)) is not None:
        stages = timm_stages(timm[0])
    indices = f", out_indices: {stages}" if timm_source(answers.backbone) is not None else ""
    backbone = f"{{pretrained: {named}{indices}}}" if indices else named
    return [
        "student:",
        _line(f"  backbone: {backbone}", why),
        _line(f"  fpn: {{{head}}}", "a pyramid and a head on it; more channels cost more"),
    ]


def _teacher(answers: Answers) -> list[str]:
    known = answers.teacher in TEACHERS
    why = "knows images, not your classes: no head and no label of it is needed" if known else "your own"
    lines = ["teacher:", _line(f"  model: {_plain(answers.model)}", why)]
    if answers.cached:
        lines.append("  cache:")
        lines.append(_line("    whole: true", "it sees each image twice; its stored answers are cut for each crop"))
        lines.append(
            _line(f"    folder: {_plain(f'runs/{answers.name}_answers')}", "serves other runs with this teacher")
        )
    return lines


def _distill(answers: Answers) -> list[str]:
    starter, same_task = answers.starter, bool(answers.starter.task_loss) and answers.teacher not in TEACHERS
    gentle = starter.share if same_task and starter.labelled else 0.0
    lines = ["distill:"]
    if not starter.labelled:
        lines.append(_line("  task_weight: 0", "no labels: the teacher is all there is to learn from"))
    elif not gentle:
        lines.append(_line("  weights: recommended", "half of the gradient at most, faded out, with a guard"))
    lines.append(_line("  grid: finer", "maps are compared on the finer of the two grids"))
    lines.append("  terms:")
    if same_task:
        why = "of a teacher of the same task; for one that knows images alone instance_mse"
        lines.append(_line(f"    - loss: {starter.task_loss}", why))
    else:
        lines.append(_line("    - loss: instance_mse", "the cheapest that is not worse than cankd"))
    if gentle:
        lines.append(_line(f"      weight: {{share: {gentle:g}}}", "of the gradient: pretrained weights need no more"))
        lines.append(_line("      warmup: 0.05", "grows over the first twentieth of the run"))
        lines.append(_line("      fade: [0.3, 0.6]", "and is over after 60% of it: the rest is the labels' alone"))
    return lines


def _training(answers: Answers) -> list[str]:
    every = max(1, answers.steps // 10)
    evaluated = answers.data.get("eval_split", "validation") is not None or not answers.starter.labelled
    steps = f"{answers.hours:g} h, by steps measured on this machine" if answers.measured else "a guess: see --dry-run"
    settings: list[tuple[str, Any, str]] = [
        ("max_steps", answers.steps, steps),
        ("per_device_train_batch_size", answers.batch, "smaller where memory is short"),
        ("per_device_eval_batch_size", answers.batch, "of scoring"),
        ("learning_rate", answers.starter.learning_rate, "of AdamW, for pretrained weights"),
        ("weight_decay", 0.05, "usual for AdamW"),
        ("max_grad_norm", 1.0, "limits single odd batches"),
        ("warmup_steps", 0.05, "the first twentieth, in which the new layers settle"),
        ("lr_scheduler_type", "cosine", "down to 0 at the end"),
        ("bf16", answers.bf16, "faster where the machine has instructions for it; this one " + _has(answers.bf16)),
        ("dataloader_num_workers", answers.workers, "loading processes: cores of this machine that are left"),
        (
            "eval_strategy",
            "steps" if evaluated else "no",
            "ten times" if evaluated else "there is no validation split",
        ),
        *([("eval_steps", every, "a tenth of the run")] if evaluated else []),
        ("save_steps", every, "where an interrupted run goes on"),
        ("save_total_limit", 2, "older checkpoints are deleted"),
        ("logging_steps", min(50, every), "a line of the log"),
    ]
    return ["training:", *(_line(f"  {key}: {_plain(value)}", why) for key, value, why in settings)]


def _has(bf16: bool) -> str:
    return "has" if bf16 else "has not"
