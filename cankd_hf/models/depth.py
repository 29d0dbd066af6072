"""Depth models of any kind: what they predict, and a loss for those that `transformers` gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cankd_hf.models.fpn.configuration_cankd_fpn import DEPTH_LOSSES
from cankd_hf.models.fpn.depth_losses_cankd_fpn import depth_loss
from cankd_hf.models.fpn.modeling_cankd_fpn_depth import FPNForDepthEstimation

# Of families whose checkpoints all predict the inverse of a distance, up to scale and shift.
RELATIVE = ("dpt", "depth_anything", "prompt_depth_anything")


def depth_kind(config: Mapping[str, Any]) -> str:
    """What a model predicts by its config.json: `metric`, metres, or `relative`, inverse distances up to scale and
    shift.

    Models that were trained here say so; of others Depth Anything does. A DPT is relative, as MiDaS is, but with the
    backbone of DINOv2, whose depth models were trained on metres.
    """
    told = config.get("depth_kind") or config.get("depth_estimation_type")
    if told is not None:
        return str(told)
    inner = config.get("backbone_config") or {}
    return "relative" if config.get("model_type") in RELATIVE and inner.get("model_type") != "dinov2" else "metric"


class DepthLoss:
    """Hooks of a native depth model: they take the labels from its call, and add the loss to its output.

    Most of the models in `transformers` refuse labels ("Training is not implemented yet"). The saved model is the same
    as before.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.labels: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps the labels back."""
        self.labels = kwargs.pop("labels", None)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Adds the loss, as the first of the output."""
        labels, self.labels = self.labels, None
        if labels is None:
            return output
        if isinstance(output, tuple):
            return depth_loss(self.name, output[0], labels), *output
        return type(output)(**{**output, "loss": depth_loss(self.name, output["predicted_depth"], labels)})


def with_loss(model: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
    """The model itself, which takes labels `[B, H, W]` in metres and returns a loss.

    `name` of the loss; by default that of its configuration, else the usual one for what it predicts. A model of ours
    has its own.
    """
    if isinstance(model, FPNForDepthEstimation):
        return model
    config = model.config.to_dict()
    wanted = name or config.get("depth_loss") or DEPTH_LOSSES[depth_kind(config)][0]
    hooks = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    there = next((hook for hook in hooks if isinstance(hook, DepthLoss)), None)
    if there is not None:
        there.name = wanted
        return model
    made = DepthLoss(wanted)
    model.register_forward_pre_hook(made.before, with_kwargs=True)
    model.register_forward_hook(made.after)
    return model
