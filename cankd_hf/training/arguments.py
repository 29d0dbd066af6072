"""Training arguments with defaults for distillation."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from cankd_hf.config.training import out_of_range
from cankd_hf.errors import InputError, Problem
from cankd_hf.tokens import NO_TOKEN, holds_secret
from cankd_hf.training.parallel import check_deepspeed


@dataclass
class CanKDConfig(TrainingArguments):
    """`transformers.TrainingArguments` with further settings for distillation.

    Fields of `TrainingArguments` work as documented there; docs/trainer.md lists all of them, with the few that are
    refused and why (`REFUSED`). `hub_token` is refused, because the Trainer would save it as plain text: use the
    environment variable HF_TOKEN or `hf auth login`.

    Raises:
        InputError: for a field that is refused, or a value out of range.
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
    ema: float | str | None = field(
        default=None,
        metadata={
            "help": "Also average the student's weights over the steps (EMA): `auto`, about 2% of the run, or a decay "
            "between 0 and 1; null: off. The average is saved in `ema/` of the output folder and of every checkpoint; "
            "at the end the student gets the better of the two, chosen on validation."
        },
    )
    channels_last: bool = field(
        default=False,
        metadata={
            "help": "Keep images and weights in channels-last layout: the same result, often faster for CNNs. A "
            "recipe without it chooses by its device."
        },
    )
    measure_similarity: bool = field(
        default=True,
        metadata={
            "help": "Log the raw teacher-student similarity at every logging step, and the share of the gradient that "
            "each term has at most every 50 steps."
        },
    )
    check_images: int = field(
        default=16,
        metadata={
            "help": "Number of images of the evaluation set, at most, on which a run with a teacher measures whether "
            "it works; fewer, where all measurements would be more than 1% of the images trained on; 0: never."
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "Number of optimizer steps in a row without a finite loss and gradient after which the run stops, "
            ">= 1. The update of each such step is skipped."
        },
    )
    conditioning_batches: int = field(
        default=16,
        metadata={
            "help": "Number of training batches of each process, >= 1, on which the statistics of a term's "
            "conditioning are measured before the first step, by the teachers alone."
        },
    )
    prediction_images: int = field(
        default=4,
        metadata={
            "help": "Number of validation images for which `predictions.png` is drawn after each evaluation of a "
            "recipe's training; 0: never."
        },
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
        if self.dataloader_pin_memory and torch.cuda.is_available():
            self.accelerator_config = _copying_aside(self.accelerator_config)
        check_deepspeed(self.deepspeed)
        self.ema = _number_or_word(self.ema)
        super().__post_init__()  # type: ignore[no-untyped-call]
        _check(vars(self))


def _number_or_word(given: Any) -> Any:
    """A decay as a command line gives it, as text; `off` is None."""
    if given is False or given == "off":
        return None
    try:
        return float(given) if isinstance(given, str) and given != "auto" else given
    except ValueError:
        return given  # refused by `own_problems`


def _copying_aside(given: Any) -> Any:
    """The `accelerator_config` with `non_blocking`, if it does not say otherwise: pinned batches go to the device
    beside its work, where each copy would otherwise wait until all of it is done."""
    return {"non_blocking": True, **(given or {})} if given is None or isinstance(given, Mapping) else given


_FULL_EVAL = (
    "it casts the student for good, but not the images; set {0}: true instead, which evaluates in {0} and keeps the "
    "weights in float32"
)
# Fields of `TrainingArguments` that cannot do here what they do elsewhere -> the fact that prevents it, and the fix.
REFUSED = {
    "label_smoothing_factor": "the Trainer smooths over the last axis of the logits, which is no class axis in dense "
    "prediction; smooth in a compute_loss_func, e.g. torch.nn.functional.cross_entropy(..., label_smoothing=0.1)",
    "bf16_full_eval": _FULL_EVAL.format("bf16"),
    "fp16_full_eval": _FULL_EVAL.format("fp16"),
    "use_liger_kernel": "Liger has kernels for language models alone; leave it out",
    "liger_kernel_config": "Liger has kernels for language models alone; leave it out",
    "enable_jit_checkpoint": "SIGTERM already saves a checkpoint and stops, and only one handler can have it; leave "
    "it out",
    "parallelism_config": "it splits sequences of tokens, layers or experts, which students have not; for weights in "
    "shards set fsdp or deepspeed",
}


def as_config(args: TrainingArguments) -> CanKDConfig:
    """Plain training arguments as a `CanKDConfig` with its further settings at their defaults; a copy.

    Raises:
        InputError: for a field that is refused.
    """
    if isinstance(args, CanKDConfig):
        _check(vars(args))  # fields may have been set since
        return args
    kind: Any = CanKDConfig
    if type(args) is not TrainingArguments:  # the user's own, with fields and methods of its own
        kind = make_dataclass(type(args).__name__, [], bases=(CanKDConfig, type(args)))
    made = copy.copy(args)
    made.__class__ = kind
    for one in fields(CanKDConfig):
        if not hasattr(args, one.name):
            vars(made)[one.name] = one.default if one.default_factory is MISSING else one.default_factory()
    _check(vars(made))
    return made  # type: ignore[return-value]


def _check(settings: Mapping[str, Any]) -> None:
    problems = [Problem(f"training.{key}", message) for key, message in own_problems(settings)]
    if problems:
        raise InputError(problems)


def own_problems(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Settings that are refused or out of range, and those that hold a token: key and message."""
    if settings.get("hub_token"):
        yield "hub_token", NO_TOKEN
    for key, value in settings.items():
        if isinstance(value, str) and holds_secret(value):
            yield key, NO_TOKEN
    for key, reason in REFUSED.items():
        if settings.get(key):
            yield key, reason
    if settings.get("output_dir") == "":
        yield "output_dir", "expected a folder, got an empty name, which would be the current folder; name one"
    yield from out_of_range(settings)
    ema = settings.get("ema")
    if not (ema is None or ema is False or ema in ("auto", "off")) and not (type(ema) is float and 0 < ema < 1):
        yield "ema", f"expected auto, a decay between 0 and 1 such as 0.99, or null, got {ema!r}"
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
