"""The optimizer methods of `CanKDTrainer`."""

import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.backbone_utils import BackboneMixin

from cankd_hf.errors import InputError
from cankd_hf.training.arguments import stepped_schedule
from cankd_hf.training.base import TeachingTrainer

logger = logging.getLogger(__name__)


class OptimizerMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for the optimizer and its schedule."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        whole, new = self.distiller if model is None else model, self.optimizer is None
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        if new and self.args.backbone_lr_scale != 1.0:
            self._scale_backbone(optimizer, whole)
        self._add_distillation(optimizer, whole)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        given = self.optimizer if optimizer is None else optimizer
        assert given is not None
        if not self.is_deepspeed_enabled:  # a `create_optimizer` of a subclass knows only the student
            self._add_distillation(given, self.distiller)
        if self.args.lr_drops and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = stepped_schedule(given, num_training_steps, self.args.lr_drops, warmup)
            self._created_lr_scheduler = True
        if self.args.get_warmup_steps(num_training_steps) == num_training_steps:
            num_training_steps += 1  # a polynomial decay of no steps divides by zero, after a run of one step, say
        return super().create_scheduler(num_training_steps, optimizer)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """As in `transformers.Trainer`; names in `optim_target_modules` are those of the student's modules."""
        return Trainer.get_optimizer_cls_and_kwargs(args, getattr(model, "student", model))

    def _add_distillation(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Adds connectors and losses to an optimizer that was made of the student's parameters alone.

        They join the group with the highest learning rate, as a new head would, so that a scheduler that was made for
        these groups moves them too.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [
            p
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in held and ".student." not in f".{name}"
        ]
        if not missing:
            return
        number, group = max(enumerate(optimizer.param_groups), key=lambda item: item[1].get("lr") or 0.0)
        group["params"] = [*group["params"], *missing]
        logger.warning(
            "optimizers: connectors and losses were in none of its groups; their %d tensors join group %d (lr %s)",
            *(len(missing), number, group.get("lr")),
        )

    def _scale_backbone(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Moves the backbone's parameters into groups with their own learning rate."""
        # At the top of our own students, inside `model` in the native detectors, called otherwise in Mask2Former.
        backbone = {id(p) for name, p in model.named_parameters() if ".backbone." in f".{name}"}
        for name, part in model.named_modules():
            if name not in ("", "student") and isinstance(part, BackboneMixin):
                backbone |= {id(p) for p in cast(nn.Module, part).parameters()}
        if not backbone:
            raise InputError("training.backbone_lr_scale: the student has no module called `backbone`; leave it at 1")
        for group in list(optimizer.param_groups):
            inside = [p for p in group["params"] if id(p) in backbone]
            if inside:
                group["params"] = [p for p in group["params"] if id(p) not in backbone]
                lr = group["lr"] * self.args.backbone_lr_scale
                optimizer.add_param_group({**group, "params": inside, "lr": lr})
