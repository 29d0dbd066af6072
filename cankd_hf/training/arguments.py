"""Training arguments with defaults for distillation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from cankd_hf.config.training import out_of_range
from cankd_hf.errors import InputError, Problem
from cankd_hf.tokens import NO_TOKEN, holds_secret


@dataclass
class CanKDConfig(TrainingArguments):
    """`transformers.TrainingArguments` with further settings for distillation.

    Every field of `TrainingArguments` works as documented there. `hub_token` is refused, because the Trainer would
    save it as plain text: use the environment variable HF_TOKEN or `hf auth login`.

    Raises:
        InputError: for a `hub_token`, or a value out of range.
    """

    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Keep it false: images are decoded on access, from columns that the model does not take."},
    )
    backbone_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning rate of the student's backbone as a multiple of learning_rate, > 0."}
    )
    lr_drops: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Fractions of the run, 0 to 1, after each of which the learning rate is divided by 10: [0.667, "
            "0.917] for epochs 16 and 22 of 24. Replaces lr_scheduler_type; warmup_steps still applies."
        },
    )
    sync_batchnorm: bool = field(
        default=False, metadata={"help": "Turn BatchNorm of student and distillation modules into SyncBatchNorm."}
    )
    channels_last: bool = field(
        default=False,
        metadata={"help": "Keep images and weights in channels-last layout: the same result, often faster for CNNs."},
    )
    measure_similarity: bool = field(
        default=True, metadata={"help": "Log the raw teacher-student similarity at every logging step."}
    )
    log_figures_steps: int = field(
        default=0,
        metadata={
            "help": "Number of steps after which figures of two validation images (maps, attention) are sent to the "
            "trackers of report_to; 0: never."
        },
    )

    def __post_init__(self) -> None:
        # CPUs compute in bf16 too, but transformers requires use_cpu to be set explicitly.
        if not torch.accelerator.is_available():
            if self.bf16:
                self.use_cpu = True
            self.dataloader_pin_memory = False
        super().__post_init__()  # type: ignore[no-untyped-call]
        problems = [Problem(f"training.{key}", message) for key, message in own_problems(vars(self))]
        if problems:
            raise InputError(problems)


def own_problems(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings out of range, and those that hold a token: key and message."""
    if settings.get("hub_token"):
        yield "hub_token", NO_TOKEN
    for key, value in settings.items():
        if isinstance(value, str) and holds_secret(value):
            yield key, NO_TOKEN
    if settings.get("output_dir") == "":
        yield "output_dir", "expected a folder, got an empty name, which would be the current folder; name one"
    yield from out_of_range(settings)
    drops = settings.get("lr_drops", [])
    if sorted(drops) != drops or not all(0 < share < 1 for share in drops):
        yield "lr_drops", f"expected rising shares between 0 and 1, got {drops}"


def stepped_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, drops: list[float], warmup_steps: int = 0
) -> LambdaLR:
    """The schedule of the published detectors: a linear warm-up, then the rate is divided by 10 after each drop.

    `drops` are fractions of `total_steps`; the warm-up starts at 0.
    """

    def factor(step: int) -> float:
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return warm * 0.1 ** sum(step >= share * total_steps for share in drops)

    return LambdaLR(optimizer, factor)
