"""BatchNorm of a single value per channel: after global pooling, with one image in the batch."""

import logging
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def allow_single_values(module: nn.Module, args: TrainingArguments | None = None) -> None:
    """Lets each BatchNorm normalise a single value per channel by its running statistics, and tells it once, with
    what helps under these arguments of the training.

    A single value has no variance: torch raises an error in training. It occurs in heads that pool the whole map, when
    a batch has one image, such as the last one of an epoch. Running statistics are what such a layer uses in
    evaluation; they are not updated by this batch. All other batches are normalised as ever.
    """
    told, fix = list[str](), ""
    if args is None or (args.per_device_train_batch_size > 1 and not args.dataloader_drop_last):
        fix = " To leave such a last batch out, set training.dataloader_drop_last: true"
    elif args.per_device_train_batch_size == 1:
        fix = " All batches have one: set training.per_device_train_batch_size to 2 or more"
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and not any(
            isinstance(hook, _Before) for hook in part._forward_pre_hooks.values()
        ):
            part.register_forward_pre_hook(_Before(name, told, fix))


class _Before:
    """Sets the layer to evaluation for a single value, and back after its forward pass; the first of all warns."""

    def __init__(self, name: str, told: list[str], fix: str) -> None:
        self.name, self.told, self.fix = name, told, fix

    def __call__(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0]
        if not norm.training or norm.running_mean is None or values.numel() != values.shape[1]:
            return
        synchronised = isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_initialized()
        if synchronised and torch.distributed.get_world_size(cast(Any, norm).process_group) > 1:
            return  # it takes the values of all processes together
        norm.eval()
        handle: Any = norm.register_forward_hook(lambda *_: self._after(norm, handle), always_call=True)

    def _after(self, norm: nn.Module, handle: Any) -> None:
        handle.remove()
        norm.train()
        if not self.told:
            self.told.append(self.name)
            logger.warning(
                "%s: a batch has one image, and so one value per channel here: this BatchNorm takes its running "
                "statistics for it.%s",
                *(self.name, self.fix),
            )
