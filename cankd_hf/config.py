"""Training arguments with the defaults distillation needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from cankd_hf.errors import InputError


@dataclass
class CanKDConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus what only distillation asks for.

    Every field of `TrainingArguments` works as documented there. `hub_token` is refused, because the Trainer would
    write it down in clear: use the environment variable HF_TOKEN or `hf auth login`.

    Raises:
        InputError: for a `hub_token`, or a value out of range.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: images are decoded on access, from columns the model never sees."}
    )
    backbone_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning rate of the student's backbone as a multiple of learning_rate, > 0."}
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
            "help": "Send figures of two validation images (maps, attention) to the trackers of report_to every so "
            "many steps; 0: never."
        },
    )

    def __post_init__(self) -> None:
        # CPUs compute in bf16 too, but transformers wants to be told that no accelerator is missing by mistake.
        if not torch.accelerator.is_available():
            if self.bf16:
                self.use_cpu = True
            self.dataloader_pin_memory = False
        super().__post_init__()
        problems = []
        if self.hub_token:
            problems.append(
                "training.hub_token: tokens are not taken as settings, they would end up in files and logs; set the "
                "environment variable HF_TOKEN or run `hf auth login`"
            )
        if not self.backbone_lr_scale > 0:
            problems.append(f"training.backbone_lr_scale: expected a number > 0, got {self.backbone_lr_scale}")
        if self.log_figures_steps < 0:
            problems.append(
                f"training.log_figures_steps: expected a number of steps, or 0 for never, got {self.log_figures_steps}"
            )
        if problems:
            raise InputError(problems)
