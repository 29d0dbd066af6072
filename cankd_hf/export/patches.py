"""While a student is traced: code of libraries that a symbolic size does not get through, written another way."""

import builtins
import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.nn.functional import pad


@contextlib.contextmanager
def traceable(form: nn.Module) -> Iterator[None]:
    """Applies the patches for the libraries that a form's parts are of. The results stay the same."""
    modules = {type(part).__module__ for part in form.modules()}
    with contextlib.ExitStack() as stack:
        for name in sorted(modules):
            module = sys.modules[name]
            if name.startswith("transformers.") and not hasattr(module, "len"):
                # Python's own returns a plain number, which makes the batch a constant (RT-DETR).
                stack.enter_context(patch.object(module, "len", _length, create=True))
            if name.startswith("transformers.") and hasattr(module, "apply_tf_padding"):  # MobileNet
                stack.enter_context(patch.object(module, "apply_tf_padding", _padded))
            if name.startswith("transformers.") and hasattr(module, "DynamicPad2d"):  # BiT
                forward = lambda layer, features: _padded(features, layer, layer.value)  # noqa: E731
                stack.enter_context(patch.object(module.DynamicPad2d, "forward", forward))
        timm = sys.modules.get("timm.layers.padding")
        if timm is not None and hasattr(timm, "get_same_padding"):
            stack.enter_context(patch.object(timm, "get_same_padding", same_padding))
        yield


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) else builtins.len(value)


def same_padding(x: Any, kernel_size: int, stride: int, dilation: int = 1) -> Any:
    """Cells that TensorFlow's "SAME" padding adds to a side of `x` cells, so that ceil(x / stride) come out.

    Libraries write it with `max` and a rounded quotient, which symbols do not simplify: each layer repeats the
    expression of the layer before it several times, and tracing takes minutes. Here the padded side is a multiple of
    the stride plus a constant, and what comes out is `(x + stride - 1) // stride`.
    """
    reach = (kernel_size - 1) * dilation + 1
    added = (x + stride - 1) // stride * stride + reach - stride - x
    return added if reach >= stride else max(added, 0)


def _padded(features: Tensor, layer: Any, value: float = 0.0) -> Tensor:
    """Pads [B, C, h, w] for a convolution or pooling; the odd cell is on the right and below."""
    sides = zip(features.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    height, width = (same_padding(*side) for side in sides)
    return pad(features, (width // 2, width - width // 2, height // 2, height - height // 2), value=value)
