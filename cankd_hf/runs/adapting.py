"""Adapted teachers: a neck and a head on a bare backbone, trained on the task before the student is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel

from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import AdaptConfig, TeacherConfig
from cankd_hf.errors import InputError

BACKBONE = "backbone"


def untrained(config: TeacherConfig) -> StudentConfig:
    """The model that `teacher.fit` trains: the teacher's own, or a pyramid on it as its backbone."""
    if config.adapt is None:
        return StudentConfig(model=config.model, config=config.config)
    backbone = config.model if config.model is not None else config.config
    fpn, revision, trusted = dict(config.adapt.fpn), config.revision, config.trust_remote_code
    return StudentConfig(backbone=backbone, fpn=fpn, revision=revision, trust_remote_code=trusted)


def frozen(config: AdaptConfig | None) -> list[str] | None:
    """The parts that are not trained."""
    return [BACKBONE] if config is not None and config.tune == "head" else None


def with_adapters(model: PreTrainedModel, config: AdaptConfig | None) -> Callable[[], None]:
    """Puts low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) into the backbone, if they are asked for; its
    own weights are frozen. Returns what merges them into its weights after training.

    Raises:
        InputError: without `peft`, or if no layer of the backbone is to get one.
    """
    if config is None or config.tune != "lora":
        return lambda: None
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise InputError(
            "teacher.adapt.tune: lora needs the package peft, which is not installed; `pip install peft`, or set it "
            "to head or all"
        ) from error
    backbone: nn.Module = getattr(model, BACKBONE)
    names = targets_in(backbone, config.targets)
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha or 2 * config.rank, target_modules=names)
    adapted = LoraModel(backbone, settings, "default")
    return lambda: setattr(model, BACKBONE, adapted.merge_and_unload())


def targets_in(backbone: nn.Module, asked: Sequence[str] | None) -> list[str]:
    """Paths of the linear layers that get adapters: those whose last names are asked for, else those of attention."""
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if asked is None:
        found = [name for name in linear if "attention" in name or "attn" in name]
    else:
        found = [name for name in linear if name.rpartition(".")[2] in asked]
    if not found:
        last = sorted({name.rpartition(".")[2] for name in linear})
        fix = f"name some of {', '.join(last)}" if last else "it has no linear layers: set tune to head or all"
        raise InputError(
            f"teacher.adapt.targets: expected linear layers of {type(backbone).__name__}, got none; {fix}"
        )
    return found
