"""Whether the terms fight the task: the angle between their gradients at the student's maps, and what follows.

At a tap of a term, let G be the gradient of the task's loss and g that of the term. Two cosines say whether the task's
loss falls, to first order, where the term's does (Du et al., arXiv 1812.02224, ask so whether an auxiliary loss helps;
Yu et al., arXiv 2001.06782, call it a conflict below 0):

- of single images, `<G, g> / (|G| |g|)` of the map's gradients, a mean in which each image and tap counts alike:
  whether the target knows something of the task. It is 0 for an untrained teacher.
- of the layer: the same for `sum over positions of G s^T` and `g s^T` [C, C], the gradients of a 1x1 convolution at
  the tap, which is what all positions of a batch have in common: whether the student can serve both. It is below 0
  for a teacher of other classes, whose target goes along with the labels wherever the student is wrong about both.

A term is judged by the lower of the two, smoothed. If it stays low for long, its weight is halved, and again while it
stays so; a term that agrees with the task again gets its weight back in the same steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cankd_hf.config.distill import Guard, LossTerm
from cankd_hf.errors import InputError
from cankd_hf.training.tap_gradients import TapGradients, TermLoss

SOON, OFTEN, SELDOM = 100, 10, 50
FOLLOW = 0.2  # part of a new cosine in the smoothed one, once there are five
MARGIN = 0.005  # between the cosine that turns a term down and the one that turns it up
STEP = 2.0  # by which a weight is divided, or multiplied
TASK = "held_out_task_loss"
PLACE, FIX = "distill.guard", "leave it out"
Both = dict[int, tuple[Tensor, Tensor, Tensor] | None]  # by tap, see `_pair`
# Places in the state of a term.
IMAGES, LAYER, COUNT, HELD, HELD_LAYER, HELD_COUNT, AGAINST, ALONG, FACTOR = range(9)


class Conflict(nn.Module):
    """The smoothed cosine of each term and what its weight is multiplied by, as buffers that checkpoints hold.

    Args:
        terms: of the objective.
        guard: when a term is turned down; None measures nothing.
        known: the states so far, of which those of the same terms are kept.
    """

    def __init__(self, terms: Iterable[LossTerm], guard: Guard | None = None, known: Conflict | None = None) -> None:
        super().__init__()
        self.guard = guard
        self.labels = [] if guard is None else [term.label for term in terms if term.counts]
        before = {} if known is None else dict(known.named_buffers())
        for label in self.labels:
            fresh = torch.zeros(10)  # the last is not used: checkpoints have it, from when the share was kept here
            fresh[FACTOR] = 1.0
            self.register_buffer(_name(label), before.get(_name(label), fresh))

        if guard is not None and guard.holdout and self.labels:
            self.register_buffer(TASK, before.get(TASK, torch.zeros(())))

    def __bool__(self) -> bool:
        return bool(self.labels)

    def due(self, step: int) -> bool:
        """Whether the angle is measured in a step; the same in all processes."""
        return bool(self) and step % (OFTEN if step < SOON else SELDOM) == 0

    def factor(self, label: str) -> Tensor | float:
        """What the weight of a term is multiplied by, []; 1 where nothing is watched."""
        # a copy: the buffer changes while the graph of a step may still need this value
        return self.get_buffer(_name(label))[FACTOR].clone() if self else 1.0

    def logged(self) -> dict[str, float]:
        """For the log, by name, once measured: cosines, and the factor of the weight."""
        found: dict[str, float] = {}
        for label in self.labels:
            state = self.get_buffer(_name(label)).tolist()
            if state[COUNT]:
                found |= {f"conflict/{label}": min(state[IMAGES], state[LAYER])}
            if state[HELD_COUNT]:
                held = min(state[HELD], state[HELD_LAYER])
                found |= {f"conflict_held_out/{label}": held, TASK: float(self.get_buffer(TASK))}
            found[f"turned_down/{label}"] = state[FACTOR]
        return found

    def check(self, sharded: bool, own_loss: bool, task_weight: float) -> None:
        """Raises InputError where gradients cannot be compared."""
        if self and sharded:
            raise InputError(f"{PLACE}: needs gradients in the forward pass, which FSDP and DeepSpeed forbid; use DDP")
        if self and own_loss:
            raise InputError(f"{PLACE}: does not see the loss of a compute_loss_func; leave it out")
        if self and not task_weight:
            raise InputError(f"{PLACE}: compares the terms with the task, whose task_weight is 0; leave it out")

    def measure(
        self, task: Tensor | None, terms: Mapping[str, TermLoss], gradients: TapGradients, held: bool = False
    ) -> None:
        """Takes in the gradients of one batch and sets the factors.

        Args:
            task: the task's loss []; None if this batch has none.
            terms: the unweighted losses of the terms; terms without an entry keep their state.
            gradients: at the student's maps.
            held: whether the batch is of images that were held out.

        Raises:
            InputError: if a map does not train or is not on the way to the task's loss.
        """
        device = gradients.maps[0].device
        images = torch.zeros(len(self.labels) + 1, 2, device=device)  # last: the task's loss
        layers = []
        known = {} if task is None else {label: terms[label] for label in self.labels if label in terms}
        taps = sorted({tap for loss in known.values() for tap in loss.taps})
        theirs = {} if task is None or not known else gradients.of(task, taps, PLACE, FIX)
        if task is not None:
            images[-1, :2] = torch.stack([task.detach().float(), images.new_ones(())])
        for row, label in enumerate(self.labels):
            own = terms[label].taps if label in terms else []
            both: Both = dict.fromkeys(own)  # an image without labels tells nothing, but others process some that do
            if label in known:
                ours = gradients.of(known[label].value, own, PLACE, FIX)
                both = {tap: _pair(theirs[tap], ours[tap]) for tap in own}
                images[row] = _of_images(both)
            layers.append(_of_layer(both, gradients))
        reduced = _over_processes([images, *layers])
        if held:
            self.get_buffer(TASK).copy_(reduced[0][-1, 0] / reduced[0][-1, 1].clamp_min(1))
        for label, row, layer in zip(self.labels, reduced[0], reduced[1:], strict=False):
            cosine = nn.functional.cosine_similarity(layer[0], layer[1], dim=0)
            self._take(label, torch.cat([row, cosine[None]]), held)

    def _take(self, label: str, sums: Tensor, held: bool) -> None:
        """Follows one measurement of a term, `sums` as in `_of_images`, over all processes, and the layer's cosine."""
        assert self.guard is not None
        buffer = self.get_buffer(_name(label))
        images, count, layer = sums
        state, place = buffer.clone(), HELD if held else IMAGES
        part = (1 / (state[place + 2] + 1)).clamp_min(FOLLOW)  # a plain mean at first
        state[place] += part * (images / count - state[place])
        state[place + 1] += part * (layer - state[place + 1])
        state[place + 2] += 1
        if held or not self.guard.holdout:
            self._decide(state, torch.minimum(state[place], state[place + 1]))
        valid = (count > 0) & state.isfinite().all()
        buffer.copy_(torch.where(valid, state, buffer))

    def _decide(self, state: Tensor, angle: Tensor) -> None:
        """Turns a term down while it fights for long, and up again while it agrees for long."""
        assert self.guard is not None
        state[AGAINST] = torch.where(angle < self.guard.angle, state[AGAINST] + 1, 0)
        state[ALONG] = torch.where(angle > self.guard.angle + MARGIN, state[ALONG] + 1, 0)
        down, up = (state[place] >= self.guard.patience for place in (AGAINST, ALONG))
        factor = torch.where(down, state[FACTOR] / STEP, torch.where(up, state[FACTOR] * STEP, state[FACTOR]))
        state[FACTOR] = factor.clamp(self.guard.floor, 1.0)


def _name(label: str) -> str:
    return f"of_{label}"


def _pair(task: Tensor | None, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """The two gradients, that of the term 0 for images without a task loss, and which images count [B]."""
    if task is None or own is None:
        return None
    counts = task.flatten(1).any(1) & own.flatten(1).any(1)
    return task, own * counts.view(-1, *[1] * (own.ndim - 1)), counts


def _of_images(both: Both) -> Tensor:
    """The sum of the cosines of all images at all taps of a term, and their number, [2]."""
    found = []
    for task, own, counts in filter(None, both.values()):
        norms = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in (task, own)])
        cosines = torch.where(counts, (task * own).flatten(1).sum(1) / norms.prod(0), 0)
        found.append(torch.stack([cosines.sum(), counts.sum()]))
    if not found:
        raise InputError(f"{PLACE}: expected taps that the task's loss depends on, got none; {FIX}")
    return torch.stack(found).sum(0)


def _of_layer(both: Both, gradients: TapGradients) -> Tensor:
    """The gradients of a 1x1 convolution at each tap of a term, one after the other: of the task and of the term."""
    found = [torch.zeros(2, 0, device=gradients.maps[0].device)]
    for tap, pair in both.items():
        student = gradients.cells(tap, gradients.maps[tap].detach().float())
        one = (torch.zeros_like(student),) * 2 if pair is None else (gradients.cells(tap, value) for value in pair[:2])
        found.append(torch.stack([(gradient.mT @ student).flatten() for gradient in one]))
    return torch.cat(found, 1)


def _over_processes(values: list[Tensor]) -> list[Tensor]:
    """The sums over all processes, in one message."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    flat = torch.cat([value.flatten() for value in values])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.view_as(value) for part, value in zip(parts, values, strict=True)]


def told(history: Iterable[Mapping[str, Any]]) -> str:
    """How heavy the terms of a run were, and what became of them, in a sentence each; empty if nothing was measured.

    Args:
        history: its `log_history`.
    """
    series: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for entry in history:
        for key in entry:
            kind, _, label = key.partition("/")
            if kind == "turned_down" or (kind == "gradient_share" and f"turned_down/{label}" not in entry):
                series.setdefault(label, []).append((entry.get("step", 0), entry))
    return "; ".join(_told(label, found) for label, found in series.items())


def _told(label: str, entries: list[tuple[int, Mapping[str, Any]]]) -> str:
    factors = [(step, entry[f"turned_down/{label}"]) for step, entry in entries if f"turned_down/{label}" in entry]
    words = []
    for key, what, form in (
        ("gradient_share", "share of the gradient at its taps", ".1%"),
        ("conflict", "cosine with the task's gradient", "+.3f"),
        ("conflict_held_out", "on held-out images", "+.3f"),
    ):
        values = [entry[f"{key}/{label}"] for _, entry in entries if f"{key}/{label}" in entry]
        if values:
            words.append(f"{what} {format(values[0], form)} to {format(values[-1], form)}")
    first = next((step for step, factor in factors if factor < 1), None)
    if factors and first is None:
        words.append("not turned down")
    elif first is not None:
        words.append(f"it fought the task: turned down from step {first}, to {factors[-1][1]:.3g} of its weight")
    return f"{label}: {', '.join(words)}"
