"""The part of a `Distiller` that adds its losses up: what each is multiplied by, and what is measured for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cankd_hf.training.conflict import Conflict
from cankd_hf.training.connecting import ConnectingModule
from cankd_hf.training.objective import Objective
from cankd_hf.training.placing import Placed
from cankd_hf.training.shares import Shares, Values
from cankd_hf.training.tap_gradients import TapGradients

GRADIENT_SHARE = "gradient_share/"  # in the log, before the name of a term


class WeighingModule(ConnectingModule):
    """Methods of `Distiller` that weigh the losses."""

    objective: Objective
    shares: Shares
    conflict: Conflict

    def measures(self, step: int) -> dict[str, Any]:
        """Arguments of `forward` for what is measured of gradients in a step, the same in all processes."""
        return {"weigh": self.shares.due(step), "watch": "trained" if self.conflict.due(step) else ""}

    def _task(
        self, loss: Tensor | None, counted: Tensor | None, pixel_values: Tensor
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted loss of the task [], None without labels, and its unweighted value for the log."""
        weight = self.objective.task_weight
        if not weight:
            return None, {}
        if loss is None:
            return None, {"task": pixel_values.new_zeros(()).float()}
        loss = loss if counted is None else loss * counted
        return weight * loss, {"task": loss.detach().float()}

    def _sum(
        self,
        task: Tensor | None,
        values: Values,
        factors: Tensor | None,
        maps: Sequence[Tensor],
        weigh: bool,
        watch: str,
    ) -> Tensor | None:
        """The task's loss plus all others, weighted; what is measured of their gradients is so in between."""
        total, gradients = task, TapGradients(maps) if weigh or watch else None
        plain, shared = self.shares.split(values)
        for group in (plain, shared):
            if group is shared and gradients is not None and weigh:
                self.shares.measure(total, shared, gradients)
            for item, value in group:
                weight = self._weight(item, factors) * item.weight
                total = weight * value if total is None else total + weight * value
        if gradients is not None and watch:
            self.conflict.measure(task, gradients.terms(values), gradients, watch == "held")
        return total

    def measured_shares(
        self, task: Tensor | None, values: Values, factors: Tensor | None, maps: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """How heavy each term is: its part in the sum of the norms of all losses' weighted gradients, at its own taps.

        Measured in this process and batch alone, for the log; nothing is weighted by it.

        Args:
            task: the weighted loss of the task []; None without one.
            values: the unweighted values of the terms.
            factors: of `forward`.
            maps: the student's maps, with gradient.

        Returns:
            The share [], 0 to 1, by `gradient_share/LABEL`; nan where the taps do not train, the task does not depend
            on them, or there is none. All processes get the same names.
        """
        gradients = TapGradients(maps)
        terms = gradients.terms(values)
        weights = {item.term.label: self._weight(item, factors) for item, _ in values}
        losses = [task, *(weights[label] * term.value for label, term in terms.items())]
        squares = torch.stack([_squares(gradients, loss) for loss in losses], dim=1)  # [maps, 1 + terms]
        shares = {}
        for row, (label, term) in enumerate(terms.items(), 1):
            # row by row: a list as index would be copied to the device, which waits
            norms = torch.stack([squares[tap] for tap in term.taps]).sum(0).sqrt()
            shares[GRADIENT_SHARE + label] = torch.where(norms[0] > 0, norms[row] / norms.sum(), torch.nan)
        return shares

    def _weight(self, item: Placed, factors: Tensor | None) -> Tensor | float:
        """What a loss is multiplied by, beside the weight of its pair."""
        weight = self.shares.weight(item)
        if self.conflict:
            weight = weight * self.conflict.factor(item.term.label)
        order = [term.label for term in self.objective.terms]
        return weight if factors is None else weight * factors[order.index(item.term.label)]


def _squares(gradients: TapGradients, loss: Tensor | None) -> Tensor:
    """The squared norm of a loss's gradient at each map [maps]; 0 where it depends on none, or the map is frozen."""
    zero = gradients.maps[0].new_zeros((), dtype=torch.float32)
    taps = [tap for tap, feature_map in enumerate(gradients.maps) if feature_map.requires_grad]
    found = {} if loss is None or not loss.requires_grad else gradients.of(loss, taps, "", "")
    own = [found.get(tap) for tap in range(len(gradients.maps))]
    return torch.stack([zero if gradient is None else gradient.square().sum() for gradient in own])
