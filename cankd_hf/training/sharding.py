"""FSDP2 and DeepSpeed: what is refused or told once the Trainer is built, and what sharded weights need."""

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments
from transformers.trainer import FSDP_MODEL_NAME, SCHEDULER_NAME

from cankd_hf.errors import InputError
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.checkpoint import check_classes, check_teachers
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.parallel import FSDP, launched_with

logger = logging.getLogger(__name__)

NEITHER = "neither FSDP nor DeepSpeed"


def check_sharded(trainer: TeachingTrainer) -> None:
    """Checks what came of the request, once the Trainer is built; one warning where FSDP was asked for in vain.

    Raises:
        InputError: for a policy that cuts the losses.
    """
    args = trainer.args
    if not trainer.is_fsdp_enabled:
        if (args.fsdp or launched_with("FSDP")) and args.process_index == 0:
            how = "DDP, each process with all weights" if args.world_size > 1 else "one process with all weights"
            logger.warning(
                "%s: FSDP was asked for, but accelerate shards nothing on a CPU; training with %s", FSDP, how
            )
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        # As under DDP, operations choose their type by autocast; boxes, teacher maps and losses keep theirs.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None
        )
    largest = max((_size(part) for loss in trainer.distiller.losses.values() for part in _inside(loss)), default=0)
    if plugin.min_num_params and plugin.min_num_params < largest:
        raise InputError(
            f"{FSDP}_config.min_num_params: expected at least {largest}, got {plugin.min_num_params}: distillation "
            "losses read the weights of their parts directly; or leave auto_wrap_policy at TRANSFORMER_BASED_WRAP"
        )


def _inside(losses: nn.Module) -> Iterable[nn.Module]:
    """The parts of each loss in a list of losses."""
    return (part for loss in losses.children() for part in loss.modules() if part is not loss)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def share_state(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Gives all processes the values that the first has."""
    with torch.no_grad():
        for tensor in tensors:
            value = tensor.detach().to(device).contiguous()
            torch.distributed.broadcast(value, 0)
            tensor.copy_(value)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the module's parameters in parts."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


class ShardingMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` for training in several processes."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if training and self.is_fsdp_enabled and not is_sharded(self.distiller):
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = wrapped_classes(self.args, self.distiller)
            if not plugin.cpu_ram_efficient_loading:  # as DDP does: ranks may have drawn other weights
                state = (*self.distiller.parameters(), *self.distiller.buffers())
                share_state((value for value in state if value.is_floating_point()), self.args.device)
        return super()._wrap_model(model, training, dataloader)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            check_saved_alike(
                folder, "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else NEITHER
            )
            check_teachers(folder, self.teachers)  # DeepSpeed loads the weights by itself
            check_classes(folder, self.student)
        given = max_steps, train_dataloader, resume_from_checkpoint
        return super()._prepare_for_training(*given)  # type: ignore[no-untyped-call]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        deepspeed = self.is_deepspeed_enabled
        whole = (self.is_fsdp_enabled or deepspeed) and not self.accelerator._models
        if whole:
            # Both prepare a model only together with its optimizer; before training it is evaluated as it is.
            self.is_deepspeed_enabled = False
            self.accelerator._models.append(cast(nn.Module, self.model).to(self.args.device))
        if self.args.world_size > 1:
            # Each process has its own running statistics; those of the first are saved.
            share_state((value for value in self.distiller.buffers() if value.is_floating_point()), self.args.device)
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = deepspeed
            if whole:
                self.accelerator._models.remove(self.model)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # accelerate wraps `forward` for this, but not that of a model sharded by FSDP2.
        if self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        plain = self.is_fsdp_enabled and isinstance(getattr(optimizer, "optimizer", None), torch.optim.SGD)
        if checkpoint is None or not plain or any(group["momentum"] for group in optimizer.param_groups):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # torch cannot load the state of an optimizer that has none: only the schedule is left.
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # The Trainer would save shards only, which no `from_pretrained` reads.
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        super().save_model(output_dir, _internal_call)


def wrapped_classes(args: TrainingArguments, distiller: Distiller) -> list[str]:
    """Names of the module classes that FSDP shards one by one: those asked for, or the student's own layers.

    Raises:
        InputError: for a class of which there is no module.
    """
    asked = cast(dict[str, Any], args.fsdp_config).get("transformer_layer_cls_to_wrap") if args.fsdp else None
    if asked is None and (names := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")):
        asked = names.split(",")
    known = {type(module).__name__ for module in distiller.student.modules()}
    missing = [name for name in asked or () if name not in known]
    if missing:
        raise InputError(
            f"{FSDP}_config.transformer_layer_cls_to_wrap: the student has no {', '.join(missing)}; "
            f"it has {', '.join(sorted(known))}"
        )
    return distiller._no_split_modules if asked is None else list(asked)


def check_saved_alike(folder: Path, now: str) -> None:
    """Checks that a run resumes under what its checkpoint was saved under: `FSDP`, `DeepSpeed` or `NEITHER`.

    Raises:
        InputError: for another one, whose optimizer cannot be read.
    """
    names = [path.name for path in folder.iterdir()]
    sharded = any(name.startswith(FSDP_MODEL_NAME) for name in names)
    then = "FSDP" if sharded else "DeepSpeed" if "latest" in names else NEITHER
    if then != now:
        raise InputError(
            f"{folder}: saved under {then}, resumed under {now}, which cannot read its optimizer; resume it the same "
            "way, or start a new run from its weights (student.model)"
        )
