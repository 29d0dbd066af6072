"""Whether all numbers of a model are finite."""

from collections.abc import Mapping

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The tensor, or of one that is sharded over processes the part that is here."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; waits for the device once."""
    floating = {name: local(tensor) for name, tensor in state.items() if tensor.is_floating_point()}
    flags = [torch.isfinite(tensor).all() for tensor in floating.values()]
    if not flags:
        return []
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    return [name for name, fine in zip(floating, finite, strict=True) if not fine]


def named(names: list[str]) -> str:
    """`NaN or infinity in a, b, c and 4 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"NaN or infinity in {', '.join(names[:3])}{more}"
