"""Student, connectors and losses in one forward: everything that trains, and the one place where weights apply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.features.connectors import Connector
from cankd_hf.features.pairing import pair_levels
from cankd_hf.features.similarity import channel_correlation, linear_cka
from cankd_hf.features.taps import Level, Taps
from cankd_hf.losses import LOSSES
from cankd_hf.losses.base import FeatureLoss

Pair = tuple[int, int]


def pair_name(pair: Pair) -> str:
    """`(0, 2)` -> `s0t2`: student level 0 with teacher level 2."""
    return f"s{pair[0]}t{pair[1]}"


def has_branch(loss: FeatureLoss) -> bool:
    """Whether a loss has a learned branch whose share is worth watching."""
    return type(loss).branch_share is not FeatureLoss.branch_share


class Distiller(nn.Module):
    """The student and all that trains with it: connectors (one a pair of levels) and losses (one a term and pair).

    `loss = task_weight * task + sum over terms and pairs of weight * factor * value`, where `value` is the unweighted
    feature loss. The teacher is not part of it (a submodule would be switched back to training mode, saved and
    wrapped); its maps come in as `teacher_maps`.

    Args:
        student: the model to train; returns an output with `loss` (where it has a task) and `logits`.
        terms: the weighted feature losses; none for plain training.
        teacher_levels: what the teacher's maps look like.
        image_size: (height, width) of the images at which the student's levels are measured.
        taps: where to read the student's maps.
        task_weight: multiplier of the student's own loss, >= 0; 0 trains without labels.
        grid: on which grid connectors bring two maps together, see `Connector`.

    Raises:
        InputError: unknown loss, bad options, or levels that cannot be paired.
    """

    # Read by transformers.Trainer.
    accepts_loss_kwargs = False
    main_input_name = "pixel_values"
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        student: PreTrainedModel,
        terms: Sequence[LossTerm] = (),
        teacher_levels: Sequence[Level] = (),
        image_size: tuple[int, int] = (224, 224),
        taps: str | list[str] = "auto",
        task_weight: float = 1.0,
        grid: str = "finer",
    ) -> None:
        super().__init__()
        self.student = student
        self.task_weight = task_weight
        self.terms = list(terms)
        self.connectors = nn.ModuleDict()
        self.losses = nn.ModuleDict()
        self.pairs: dict[str, list[Pair]] = {}
        self.weights: dict[str, list[float]] = {}
        self.teacher_levels = list(teacher_levels)
        self.taps = Taps(student, taps) if terms else None
        self.levels = self.taps.levels(image_size) if self.taps is not None else []
        for term in self.terms:
            self._add(term, grid)

    def _add(self, term: LossTerm, grid: str) -> None:
        term.check()
        name = term.label
        if name in self.losses:
            raise InputError(f"distill.terms: two terms are called {name!r}; give one of them another `name`")
        pairs = pair_levels(self.levels, self.teacher_levels, term.pairs)
        losses = nn.ModuleList()
        for pair in pairs:
            student_level, teacher_level = self.levels[pair[0]], self.teacher_levels[pair[1]]
            # One connector a pair: terms that look at the same pair share it.
            if pair_name(pair) not in self.connectors:
                self.connectors[pair_name(pair)] = Connector(student_level, teacher_level, grid=grid)
            try:
                losses.append(LOSSES[term.loss_name](teacher_level.channels, **term.options))
            except TypeError as error:
                raise InputError(f"distill.terms.{name}.options: {error}") from error
        self.losses[name] = losses
        self.pairs[name] = pairs
        self.weights[name] = term.weights(len(pairs))

    # What transformers.Trainer asks of a model, answered by the student.

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _no_split_modules(self) -> list[str]:
        return sorted({*(self.student._no_split_modules or []), *(cls.__name__ for cls in LOSSES.values())})

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.student.is_activation_checkpointing

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.student.activation_checkpointing_enable(*args, **kwargs)
        except ValueError as error:
            raise InputError(
                f"training.activation_checkpointing: {error} Set it to false for this student."
            ) from error

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        return self.student.num_parameters(*args, **kwargs)

    # Names of what `forward` reports, in order.

    @property
    def part_names(self) -> list[str]:
        """Of `parts`: the task loss, then each term at each of its pairs; all unweighted."""
        values = [f"{name}/{pair_name(pair)}" for name, pairs in self.pairs.items() for pair in pairs]
        return ["task", *values]

    @property
    def similarity_names(self) -> list[str]:
        """Of `similarity`: raw correlation and raw linear CKA at each pair of levels."""
        return [f"{kind}/{key}" for kind in ("correlation", "cka") for key in self.connectors]

    @property
    def branch_names(self) -> list[str]:
        """Of `branch_share`: the terms and pairs whose loss has a Can branch."""
        return [f"{name}/{pair_name(pair)}" for _, name, pair, _, loss in self.placed_losses() if has_branch(loss)]

    def forward(
        self,
        pixel_values: Tensor,
        labels: Any = None,
        teacher_maps: Sequence[Tensor] | None = None,
        factors: Tensor | None = None,
        measure: bool = False,
        **inputs: Any,
    ) -> dict[str, Any]:
        """One batch through the student and, when teacher maps come with it, through the losses.

        Args:
            pixel_values: images normalised with the student's statistics, [B, 3, H, W].
            labels: whatever the student takes; not looked at when `task_weight` is 0.
            teacher_maps: the teacher's maps of the same images, each [B, C, H, W]; None leaves the terms out.
            factors: schedule factor of each term, [number of terms], in 0..1; None means 1.
            measure: also measure raw similarity and branch share (no gradient).
            inputs: further inputs of the student.

        Returns:
            `loss` [] (None without any part), `logits` (detached; None for a backbone), `parts` [1 + pairs of all
            terms] unweighted and detached, and with `measure` `similarity` [B, 2 * pairs] and `branch_share`
            [branches]; without gradient also the student's own `outputs`.
        """
        if labels is not None and self.task_weight > 0:
            inputs["labels"] = labels
        if self.taps is not None:
            inputs = {**self.taps.forward_kwargs, **inputs}
        outputs = self.student(pixel_values=pixel_values, **inputs)
        task_loss = outputs.loss if "labels" in inputs else None
        total = None if task_loss is None else self.task_weight * task_loss
        logits = outputs.get("logits")
        parts = [pixel_values.new_zeros((), dtype=torch.float32) if task_loss is None else task_loss.detach().float()]
        result: dict[str, Any] = {"outputs": None if torch.is_grad_enabled() else outputs}

        image_size = (pixel_values.shape[-2], pixel_values.shape[-1])
        student_maps = [] if self.taps is None else self.taps.collect(image_size)
        if teacher_maps is not None:
            connected = {
                key: connector(student_maps[pair[0]], teacher_maps[pair[1]])
                for key, connector, pair in self.placed_connectors()
            }
            for index, _, pair, weight, loss in self.placed_losses():
                value = loss(*connected[pair_name(pair)])
                parts.append(value.detach())
                weighted = weight * value if factors is None else weight * factors[index] * value
                total = weighted if total is None else total + weighted
            if measure:
                result.update(self._measure(student_maps, teacher_maps, connected))
        result.update(
            loss=total,
            logits=None if logits is None else logits.detach(),
            parts=torch.stack([p.float() for p in parts]),
        )
        return result

    def placed_connectors(self) -> list[tuple[str, nn.Module, Pair]]:
        """Each connector with the name and the levels of its pair."""
        pairs = {pair_name(pair): pair for pairs in self.pairs.values() for pair in pairs}
        return [(key, connector, pairs[key]) for key, connector in self.connectors.items()]

    def placed_losses(self) -> Iterator[tuple[int, str, Pair, float, FeatureLoss]]:
        """Each loss with the number and name of its term, its levels and its weight; the order of `parts`."""
        for index, (name, pairs) in enumerate(self.pairs.items()):
            losses = cast(nn.ModuleList, self.losses[name])
            for pair, weight, loss in zip(pairs, self.weights[name], losses, strict=True):
                yield index, name, pair, weight, cast(FeatureLoss, loss)

    @torch.no_grad()
    def _measure(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        connected: dict[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Raw similarity: correlation after the connector but without a Can block, CKA even without the connector."""
        correlations = [channel_correlation(*connected[key]) for key in self.connectors]
        ckas = [linear_cka(student_maps[pair[0]], teacher_maps[pair[1]]) for _, _, pair in self.placed_connectors()]
        placed = [(pair, loss) for _, _, pair, _, loss in self.placed_losses() if has_branch(loss)]
        shares = [cast(Tensor, loss.branch_share(*connected[pair_name(pair)])) for pair, loss in placed]
        measured = {"similarity": torch.stack(correlations + ckas, dim=1)}
        if shares:
            measured["branch_share"] = torch.stack(shares)
        return measured
