"""From OpenMMLab's names of tensors to ours: rules, and the account of every tensor on both sides."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cankd_hf.convert.reading import Checkpoint
from cankd_hf.errors import InputError


@dataclass(frozen=True)
class Rule:
    """Where our tensors of a name come from.

    Args:
        ours: regular expression of our whole names.
        theirs: template of OpenMMLab's name, with groups of `ours` as `\\1`, or a function of the match.
        change: what is done to the tensor.
        optional: whether it is zeros where the file has no such tensor.
    """

    ours: str
    theirs: str | Callable[[re.Match[str]], str]
    change: Callable[[Tensor], Tensor] | None = None
    optional: bool = False

    def source(self, name: str) -> str | None:
        """Their name of ours; None if the rule is not for it."""
        match = re.fullmatch(self.ours, name)
        if match is None:
            return None
        return match.expand(self.theirs) if isinstance(self.theirs, str) else self.theirs(match)


@dataclass
class Plan:
    """How a file becomes a model.

    Args:
        fields: of `FPNConfig`.
        rules: the first that fits a name counts.
        pixels: mean and deviation of images in 0..255, RGB.
        unused: what the file may hold beside it: its kind, and a regular expression of its names.
        notes: what was found or assumed, for the user.
    """

    fields: dict[str, Any]
    rules: list[Rule]
    pixels: tuple[list[float], list[float]] = ([], [])
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def background_first(x: Tensor) -> Tensor:
    """Rows of classes with the background at the end -> at the start."""
    return torch.cat([x[-1:], x[:-1]])


def background_boxes(x: Tensor) -> Tensor:
    """Box regressions `[4 K, ...]` -> `[4 (K + 1), ...]` with an unused one for the background at the start."""
    return torch.cat([torch.zeros_like(x[:4]), x])


def transfer(made: Checkpoint, plan: Plan, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our model; what is left out goes to `made.left_out`.

    Raises:
        InputError: with all tensors that are missing, of another shape, or unknown.
    """
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    missing, misshapen = [], []
    for name, ours in wanted.items():
        source, rule = next(((found, r) for r in plan.rules if (found := r.source(name)) is not None), (None, None))
        if source is None or rule is None:
            raise AssertionError(f"no rule for {name}")
        if source not in made.state:
            if not rule.optional and not name.endswith("num_batches_tracked"):
                missing.append(source)
            state[name] = torch.zeros(ours.shape, dtype=ours.dtype)
            continue
        used.add(source)
        value = made.state[source].to(ours.dtype)
        value = value if rule.change is None else rule.change(value)
        if value.shape != ours.shape:
            misshapen.append(f"{source} {tuple(made.state[source].shape)}, expected {tuple(ours.shape)}")
        state[name] = value.clone(memory_format=torch.contiguous_format)
    unknown = []
    for name in made.state.keys() - used:
        kind = next((kind for kind, names in plan.unused.items() if re.search(names, name)), None)
        if kind is None:
            unknown.append(name)
        else:
            made.left_out.setdefault(kind, []).append(name)
    lists = {"missing": missing, "of another shape": misshapen, "unknown": sorted(unknown)}
    if problems := [
        f"{made.file.name}: {len(names)} tensors are {kind}: {some(names)}" for kind, names in lists.items() if names
    ]:
        raise InputError([*problems, f"{made.file.name}: expected another kind of model (--as), or one not supported"])
    return state


def some(names: Sequence[str], count: int = 6) -> str:
    """The first names of a list."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")
