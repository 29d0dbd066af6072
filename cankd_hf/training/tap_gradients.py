"""Gradients of single losses at the student's maps, within the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.training.placing import Placed

SCALE = 2.0**10  # of losses while they are measured: small gradients in half precision stay above 0


class TermLoss(NamedTuple):
    """The loss of a term over all its pairs."""

    value: Tensor  # [], each pair with its weight
    taps: list[int]  # numbers of the student's maps that it compares; of a loss on logits, of all


class TapGradients:
    """The gradient of each loss at each map, computed once for all that ask for it.

    Args:
        maps: the student's maps, with gradient.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.maps = [_root(feature_map) for feature_map in maps]
        self._channels = [feature_map.shape[1] for feature_map in maps]
        self._found: dict[int, tuple[Tensor, dict[int, Tensor | None]]] = {}
        self._terms: dict[str, TermLoss] = {}

    def terms(self, values: Iterable[tuple[Placed, Tensor]]) -> dict[str, TermLoss]:
        """The losses of all terms by their labels; the same objects each time a term is asked for."""
        grouped: dict[str, list[tuple[Placed, Tensor]]] = {}
        for item, value in values:
            grouped.setdefault(item.term.label, []).append((item, value))
        for label, own in grouped.items():
            if label not in self._terms:
                taps = {item.pair.student for item, _ in own if item.pair is not None}
                total = torch.stack([item.weight * value for item, value in own]).sum()
                self._terms[label] = TermLoss(total, sorted(taps) or list(range(len(self.maps))))
        return {label: self._terms[label] for label in grouped}

    def of(self, loss: Tensor, taps: Sequence[int], place: str, fix: str) -> dict[int, Tensor | None]:
        """The gradient of a loss [] at some maps, in float32, by their numbers; None where it does not depend on one.

        Args:
            loss: with its graph, which is kept.
            taps: numbers of the maps.
            place: in messages.
            fix: the same, what to do about it.

        Raises:
            InputError: for maps that do not train.
        """
        if not all(self.maps[tap].requires_grad for tap in taps):
            raise InputError(f"{place}: expected taps that train, got a frozen one; {fix}")
        _, found = self._found.setdefault(id(loss), (loss, {}))  # kept, so that no other loss gets its id
        new = [tap for tap in taps if tap not in found]
        if new:
            inputs = [self.maps[tap] for tap in new]
            gradients = torch.autograd.grad(SCALE * loss, inputs, retain_graph=True, allow_unused=True)
            found |= {tap: None if g is None else g.float() / SCALE for tap, g in zip(new, gradients, strict=True)}
        return {tap: found[tap] for tap in taps}

    def cells(self, tap: int, value: Tensor) -> Tensor:
        """A tensor like a map, with a row for each position: [B * N, C]."""
        axis = 1 if value.ndim > 2 and value.shape[1] == self._channels[tap] else -1  # tokens have channels last
        return value.movedim(axis, -1).flatten(0, -2)


def _root(feature_map: Tensor) -> Tensor:
    """The tensor that a map is a view of: the model goes on from that one, not from the view."""
    base = feature_map._base
    return feature_map if base is None else base
