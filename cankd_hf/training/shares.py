"""Weights that are set by gradient share: `weight: {share: 0.1}`.

At the taps of a term, let G be the gradient of all losses with a number as weight (task included) and g that of the
term's value. Its weight w makes `w |g|` the asked part of `|G| + sum of w |g|`, the sum over all terms with a share:
for shares that add up to S, `w = share / (1 - S) * |G| / |g|`. The norms are measured in the first step and then in
every tenth, over all processes, and the weight follows them slowly (RT-DETRv4, arXiv 2510.25257, sets one once an
epoch).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cankd_hf.config.distill import LossTerm, Share
from cankd_hf.errors import InputError
from cankd_hf.training.placing import Placed
from cankd_hf.training.tap_gradients import TapGradients

EVERY = 10  # steps between measurements
FOLLOW = 0.2  # part of a new measurement in the logarithm of the weight
Values = Sequence[tuple[Placed, Tensor]]


class Shares(nn.Module):
    """The weight of each term that has a share, as a buffer that checkpoints hold; 0 until it is measured.

    Args:
        terms: of the objective.
        known: the weights so far, of which those of the same terms are kept.
    """

    def __init__(self, terms: Iterable[LossTerm], known: Shares | None = None) -> None:
        super().__init__()
        self.asked = {term.label: term.weight.share for term in terms if isinstance(term.weight, Share)}
        for label in self.asked:
            before = None if known is None else dict(known.named_buffers()).get(_name(label))
            self.register_buffer(_name(label), torch.zeros(()) if before is None else before)
        self.measured = all(weight.any() for weight in self.buffers())  # on the host

    def __bool__(self) -> bool:
        return bool(self.asked)

    def weight(self, item: Placed) -> Tensor | float:
        """The weight of a loss [], 1 for one without a share."""
        # a copy: the buffer changes while the graph of a step may still need this value
        return self.get_buffer(_name(item.term.label)).clone() if item.term.label in self.asked else 1.0

    def due(self, step: int) -> bool:
        """Whether the norms are measured in a step; the same in all processes."""
        return bool(self) and (step % EVERY == 0 or not self.measured)

    def logged(self) -> dict[str, float]:
        """The weights for the log, by name."""
        return {f"weight/{label}": float(self.get_buffer(_name(label))) for label in self.asked}

    def check(self, sharded: bool, own_loss: bool) -> None:
        """Raises InputError where the gradients of a share cannot be measured."""
        place = "distill.terms: a weight by share"
        if self and sharded:
            raise InputError(f"{place} needs gradients in the forward pass, which FSDP and DeepSpeed forbid; use DDP")
        if self and own_loss:
            raise InputError(f"{place} does not see the loss of a compute_loss_func; give the weight as a number")

    def split(self, values: Values) -> tuple[Values, Values]:
        """The values of the terms without and with a share."""
        return (
            [one for one in values if one[0].term.label not in self.asked],
            [one for one in values if one[0].term.label in self.asked],
        )

    def measure(self, rest: Tensor | None, values: Values, maps: Sequence[Tensor] | TapGradients) -> None:
        """Sets the weights by the gradients at the student's maps.

        Args:
            rest: the weighted sum [] of all other losses; None if this batch has none.
            values: the unweighted values of the terms with a share; terms without an entry keep their weight.
            maps: the student's maps, with gradient, or the gradients at them.

        Raises:
            InputError: if a map is not on the way to the other losses.
        """
        gradients = maps if isinstance(maps, TapGradients) else TapGradients(maps)
        terms = gradients.terms(one for one in values if one[0].pair is not None)
        squares = gradients.maps[0].new_zeros(len(self.asked), 2, dtype=torch.float32)  # of |G| and |g|
        for row, label in enumerate(self.asked):
            if rest is not None and label in terms:
                own = terms[label]
                squares[row] = torch.stack([_square(gradients, loss, own.taps, label) for loss in (rest, own.value)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(squares)
        free = 1 - sum(self.asked.values())
        for (label, share), (theirs, ours) in zip(self.asked.items(), squares, strict=True):
            weight = self.get_buffer(_name(label))
            asked = share / free * (theirs / ours).sqrt()
            smooth = torch.where(weight > 0, weight.pow(1 - FOLLOW) * asked.pow(FOLLOW), asked)
            weight.copy_(torch.where((theirs > 0) & (ours > 0) & smooth.isfinite(), smooth, weight))
        # a term whose teacher was not asked yet, or a batch without labels, is measured in the next step
        self.measured = self.measured or all(bool(weight) for weight in self.buffers())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.measured = all(bool(weight) for weight in self.buffers())


def _name(label: str) -> str:
    return f"of_{label}"


def _square(gradients: TapGradients, loss: Tensor, taps: Sequence[int], label: str) -> Tensor:
    """The squared norm [] of a loss's gradient at some maps."""
    place, fix = f"distill.terms.{label}.weight.share", "give the weight as a number"
    found = gradients.of(loss, taps, place, fix)
    if any(gradient is None for gradient in found.values()):
        raise InputError(f"{place}: expected taps that the other losses depend on, got one that they do not; {fix}")
    return torch.stack([gradient.square().sum() for gradient in found.values() if gradient is not None]).sum()
