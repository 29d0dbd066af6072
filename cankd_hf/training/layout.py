"""Channels-last weights, with the one kind of layer left out that torch cannot compute in this layout on a CPU."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)


def channels_last(module: _Module, device: torch.device) -> _Module:
    """Changes the layout of a module in place; values stay as they are.

    On a CPU, the backward pass of a 1x1 convolution with a stride and less than 16 input channels writes beyond its
    memory (torch 2.14 with oneDNN, AVX-512: it crashes from images of 56x56 on). Such layers keep the usual layout.
    """
    module.to(memory_format=torch.channels_last)
    for layer in module.modules() if device.type == "cpu" else ():
        if isinstance(layer, nn.Conv2d) and _unsafe(layer):
            # `contiguous()` would change nothing: a 1x1 kernel counts as both layouts, its strides decide
            layer.weight.data = layer.weight.data.flatten().clone().view(layer.weight.shape)
            if _usual_layout not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_usual_layout)
    return module


def _unsafe(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.in_channels // layer.groups < 16


def _usual_layout(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)
