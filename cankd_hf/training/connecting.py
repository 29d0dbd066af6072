"""The part of a `Distiller` between the models and the losses: pairs of maps, connected and conditioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cankd_hf.config.distill import LossTerm
from cankd_hf.features.grids import resize_map
from cankd_hf.features.similarity import channel_correlation, linear_cka
from cankd_hf.losses.base import DistillationLoss
from cankd_hf.losses.targets import Measured
from cankd_hf.teachers.teacher import TeacherOutput
from cankd_hf.training.placing import Pair, Placed, TeacherLevel, TeacherShape

# A `Placed` without its module, which is looked up each time because wrappers (FSDP) may replace it.
Place = tuple[LossTerm, str, Pair | None, float]
Connected = dict[str, tuple[Tensor, Tensor]]


class ConnectingModule(nn.Module):
    """Methods of `Distiller` that bring the maps of a pair together and measure how alike they are."""

    teachers: dict[str, TeacherShape]
    connectors: nn.ModuleDict
    losses: nn.ModuleDict
    conditioning: nn.ModuleDict
    _places: list[Place]

    @property
    def placed(self) -> list[Placed]:
        """All losses of all terms, in the order of `losses`."""
        modules = [loss for losses in self.losses.values() for loss in cast(nn.ModuleList, losses)]
        return [Placed(*place, loss) for place, loss in zip(self._places, modules, strict=True)]

    @property
    def pairs(self) -> dict[str, Pair]:
        """The pairs of levels that are compared, by name, in the order of `connectors`."""
        found = {item.pair.name: item.pair for item in self.placed if item.pair is not None}
        return {name: found[name] for name in self.connectors}

    @property
    def conditioned(self) -> dict[str, list[str]]:
        """For each pair the names of the conditionings that its terms ask for (empty: none), that of the first term
        first."""
        found: dict[str, dict[str, None]] = {}
        for item in self.placed:
            if item.pair is not None:
                found.setdefault(item.pair.name, {})[item.conditioned] = None
        return {name: list(kinds) for name, kinds in found.items()}

    @property
    def unmeasured(self) -> list[tuple[TeacherLevel, Measured]]:
        """The conditionings that have no statistics yet, with the maps they are of."""
        levels = {item.conditioned: TeacherLevel(item.teacher, item.pair.teacher) for item in self.placed if item.pair}
        modules = ((name, module) for name, module in self.conditioning.items() if isinstance(module, Measured))
        return [(levels[name], module) for name, module in modules if not module.is_ready]

    def is_measured(self, name: str) -> bool:
        """Whether a conditioning can be used: it needs no statistics, or has them."""
        module = self.conditioning[name]
        return not isinstance(module, Measured) or module.is_ready

    def connect(
        self, maps: Sequence[Tensor], teachers: Mapping[str, TeacherOutput], seen: Tensor | None = None
    ) -> Connected:
        """Student and teacher map of each pair after its connector, [B, C, H, W] on one grid, by the pair's name.

        The teacher's map is conditioned as the pair's first term asks; where others ask for something else, there is
        an entry `s0t0/NAME` for each further conditioning. Each map is conditioned once for all that ask for it.

        Where `seen` [B, H, W] is False in any pixel of a cell, both maps are 0: what the student does not see of a
        picture, such as its padding, neither teaches nor counts.
        """
        connected: Connected = {}
        targets: dict[str, Tensor] = {}
        kinds = self.conditioned
        for name, pair in self.pairs.items():
            if (output := self._output(teachers, pair)) is None:
                continue
            for kind in kinds[name]:
                target = targets.get(kind) if kind else output.maps[pair.teacher]
                if target is None:
                    target = targets[kind] = self.conditioning[kind](output.maps[pair.teacher])
                if name in connected:
                    student = connected[name][0]
                    size = (student.shape[-2], student.shape[-1])
                    connected[f"{name}/{kind}"] = student, resize_map(target, size)
                else:
                    connected[name] = self.connectors[name](maps[pair.student], target)
        return connected if seen is None else {name: _seen(*found, seen) for name, found in connected.items()}

    def compared(self, connected: Connected, item: Placed) -> tuple[Tensor, Tensor] | None:
        """The maps that a loss compares; None if its teacher was not asked."""
        assert item.pair is not None
        return connected.get(f"{item.pair.name}/{item.conditioned}", connected.get(item.pair.name))

    def _output(self, teachers: Mapping[str, TeacherOutput], pair: Pair) -> TeacherOutput | None:
        return teachers.get(pair.of or next(iter(self.teachers)))

    def without_branches(self, connected: Connected) -> dict[str, Tensor]:
        """The losses [] that have a learned branch, with it switched off, by name."""
        found = {
            item.name: cast(DistillationLoss, item.loss).without_branch(*maps)
            for item in self.placed
            if item.pair is not None and item.has_branch and (maps := self.compared(connected, item)) is not None
        }
        return {name: value for name, value in found.items() if value is not None}

    @torch.no_grad()
    def measure(
        self, maps: Sequence[Tensor], teachers: Mapping[str, TeacherOutput], connected: Connected
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Raw similarity [B] and branch shares [] by name.

        Correlation compares maps after the connector and before the Can block, CKA maps before the connector.
        The teacher's map is conditioned as the first term of the pair asks.
        """
        names = [name for name in self.pairs if name in connected]
        similarity = {f"correlation/{name}": channel_correlation(*connected[name]) for name in names}
        for name, pair in self.pairs.items():
            if name in connected and (output := self._output(teachers, pair)) is not None:
                similarity[f"cka/{name}"] = linear_cka(maps[pair.student], output.maps[pair.teacher])
        shares = {
            item.name: cast(DistillationLoss, item.loss).branch_share(*found)
            for item in self.placed
            if item.pair is not None and item.has_branch and (found := self.compared(connected, item)) is not None
        }
        return similarity, cast(dict[str, Tensor], shares)


def _seen(student: Tensor, teacher: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps [B, C, H, W], 0 in cells that are not wholly seen."""
    cells = seen_cells(seen, (student.shape[-2], student.shape[-1]))[:, None]
    return torch.where(cells, student, 0), torch.where(cells, teacher, 0)


def seen_cells(seen: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether all pixels [B, H, W] of a cell are seen, for a map of this size: bool [B, h, w]."""
    return functional.adaptive_max_pool2d((~seen)[:, None].float(), size)[:, 0] == 0
