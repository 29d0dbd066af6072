"""Statistics of the teachers' maps, for terms with a `conditioning`: measured before the first step, then frozen."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from cankd_hf.data.common.batch import Batch
from cankd_hf.errors import InputError
from cankd_hf.training.base import TeachingTrainer

logger = logging.getLogger(__name__)


class ConditioningMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that measure what conditionings need, before a teacher is asked for the first time."""

    def _ask_teachers(self, batch: Batch, factors: list[float], measure: bool) -> dict[str, Any]:
        if self.distiller.unmeasured:
            self.measure_conditioning()
        return super()._ask_teachers(batch, factors, measure)

    def measure_conditioning(self) -> None:
        """Measures the statistics that are missing: the teachers on the first `conditioning_batches` training batches.

        They are the batches that training begins with; the random state does not change. All processes add up what
        they saw, and end up with the same values.

        Raises:
            InputError: without training data.
        """
        wanted = self.distiller.unmeasured
        if not wanted:
            return
        if self.train_dataset is None:
            raise InputError("train_dataset: expected one to measure the conditioning's statistics on, got none")
        names, count = sorted({level.teacher for level, _ in wanted}), self.args.conditioning_batches
        logger.info("Measuring the statistics of %s on %d batches", ", ".join(names), count)
        sums: dict[int, Tensor] = {}
        for batch in self.first_batches(count):
            outputs = self.source(batch, names)
            for index, (level, module) in enumerate(wanted):
                found = module.sums(outputs[level.teacher].maps[level.number])
                sums[index] = found if index not in sums else sums[index] + found
        for index, (_, module) in enumerate(wanted):
            module.settle(self.accelerator.reduce(sums[index], "sum"))
            for buffer in module.buffers():
                if self.args.world_size > 1 and buffer.dtype != torch.bool:
                    buffer.copy_(broadcast(buffer))
