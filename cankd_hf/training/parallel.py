"""Which ways of dividing the work over processes are refused, before anything is built."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import is_deepspeed_available
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from cankd_hf.errors import InputError

FSDP = "training.fsdp"
DEEPSPEED = "training.deepspeed"


def launched_with(kind: str) -> bool:
    """Whether `accelerate launch` was asked for `FSDP` or `DEEPSPEED`."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def check_deepspeed(config: Any) -> None:
    """Checks a configuration of DeepSpeed, a mapping or the path of a JSON file, before transformers reads it.

    Raises:
        InputError: for ZeRO-3, or if DeepSpeed is not installed.
    """
    if not config and not launched_with("DEEPSPEED"):
        return
    if isinstance(config, str) and Path(config).is_file():
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    refuse_zero3(zero.get("stage") if isinstance(zero, Mapping) else os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"))
    if not is_deepspeed_available():
        raise InputError(f"{DEEPSPEED}: DeepSpeed is not installed; pip install deepspeed, or use training.fsdp: true")


def check_parallel(args: TrainingArguments) -> None:
    """Checks what transformers made of the arguments.

    Raises:
        InputError: for ZeRO-3, for FSDP1, and for FSDP in a single process.
    """
    refuse_zero3(getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", None))
    version = (args.fsdp_plugin_args or {}).get("fsdp_version") if args.fsdp else None
    if version is None and launched_with("FSDP"):
        version = os.environ.get("FSDP_VERSION")
    if str(version) == "1":
        raise InputError(f"{FSDP}_config.version: expected 2, got 1 (FSDP1); set it, or --fsdp_version 2")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError(
            f"{FSDP}: needs several processes, got one; start them with `accelerate launch` or `torchrun`, see "
            "docs/scaling.md"
        )


def refuse_zero3(stage: Any) -> None:
    """Raises InputError for ZeRO-3."""
    if str(stage) == "3":
        raise InputError(
            f"{DEEPSPEED}: expected ZeRO stage 0, 1 or 2, got 3, which cuts weights as soon as a model is built, "
            "while students and teachers are measured with an image and losses read weights directly; set "
            "zero_optimization.stage: 2, or use training.fsdp: true"
        )
