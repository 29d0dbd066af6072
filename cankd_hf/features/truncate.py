"""Restricts a frozen model to what its taps need, and compiles it."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn


def drop_unread_stages(model: nn.Module, read: Callable[[], list[Tensor]]) -> int:
    """Removes the blocks of a `transformers` backbone after its last requested map, in place; returns their number.

    A backbone runs all its blocks even when only early maps are asked for. The lists of blocks are found by their
    length (as many as the configuration has stages), and a removal is kept only if the maps that `read` returns for
    one fixed image stay bit-equal. Other modules are left as they are.
    """
    from transformers import PreTrainedModel
    from transformers.backbone_utils import BackboneMixin

    if not isinstance(model, BackboneMixin) or not isinstance(model, PreTrainedModel):
        return 0
    names = list(model.stage_names)
    stages = len(names) - names.count("stem")  # the stem is no block of the list
    last = 1 + max(index % len(names) for index in model.out_indices) - names.count("stem")
    if last >= stages or last < 1:
        return 0
    before = _maps(read)
    if before is None:
        return 0
    removed = 0
    for path, blocks in list(model.named_modules()):
        if not isinstance(blocks, nn.ModuleList) or len(blocks) != stages:
            continue
        model.set_submodule(path, blocks[:last])
        after = _maps(read)
        if after is not None and len(after) == len(before) and all(map(torch.equal, after, before)):
            removed += stages - last
        else:
            model.set_submodule(path, blocks)
    return removed


def _maps(read: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    try:
        return read()
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # the blocks are needed after all: the caller restores them


def compile_around(model: nn.Module, tapped: Collection[str]) -> None:
    """Compiles, in place, the largest parts without a tapped module inside, so that hooks and the early stop stay
    outside of graphs. If "" (the model itself) is tapped, it is compiled whole."""
    if "" in tapped:
        model.forward = torch.compile(model.forward)
        return
    ancestors = {path.rsplit(".", cut)[0] for path in tapped for cut in range(1, path.count(".") + 1)}

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if path in ancestors or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                visit(child, path)
            else:
                child.forward = torch.compile(child.forward)

    visit(model, "")
