"""The exponential moving average (EMA) of the student's weights, and the choice between it and the last weights.

After the t-th optimizer step with weights w_t the average is `(1 - d) / (1 - d^t) * sum over i of d^(t - i) * w_i`:
the usual one with decay d, divided by the sum of its weights as Adam does (arXiv 1412.6980, section 3), so that it
never holds any of the weights that training started from. `torch.optim.swa_utils` averages in the type of the weights,
where bfloat16 rounds small changes away, begins with the start, and copies or rounds counters; hence this one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cankd_hf.errors import InputError
from cankd_hf.hub.sections import ema_line
from cankd_hf.models.weight_files import share
from cankd_hf.names import AVERAGE_FILE, EMA, RAW
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.finite import StepGuard
from cankd_hf.training.sharding import share_state

logger = logging.getLogger(__name__)

HORIZON = 0.02  # of the steps, for `auto`: published ones are 0.6 to 6% (SoftTeacher .999, UniMatch V2 .996)
LEAST, MOST = 0.95, 0.9999  # decay of `auto`
LONG = 0.1  # of the steps: a horizon above it is told
_UPDATES = "updates"  # beside the tensors in AVERAGE_FILE


def decay_of(asked: float | str, steps: int) -> float:
    """The decay for a run of so many optimizer steps; `auto` has a horizon of 2% of them."""
    return min(max(1 - 1 / (HORIZON * steps), LEAST), MOST) if isinstance(asked, str) else asked


class Average:
    """The average of a module's state over the optimizer steps; counters are copied.

    Args:
        module: whose parameters and persistent buffers are averaged; they must stay the same tensors.
        decay: of the average, in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = module.state_dict()
        known: dict[tuple[Any, ...], Tensor] = {}  # tied weights are averaged once
        self.state: dict[str, Tensor] = {}
        pairs = []
        for name, value in self._live.items():
            place = value.data_ptr(), value.shape, value.dtype
            if place not in known:
                half = value.is_floating_point() and value.element_size() < 4
                known[place] = value.detach().to(torch.float32 if half else value.dtype, copy=True)
                pairs.append((known[place], value))
            self.state[name] = known[place]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]
        device = next(iter(self._live.values())).device
        self.updates = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Takes in the present state, unless `skipped`, a bool [], which the host does not wait for."""
        skipped = skipped.to(self.updates.device)
        self.updates += ~skipped
        weight = (1 - self.decay) / -torch.expm1(self.updates * math.log(self.decay))
        weight = torch.where(skipped, torch.zeros_like(weight), weight)
        averages = [average for average, _ in self._floats]
        changes = torch._foreach_sub([value.to(average.dtype) for average, value in self._floats], averages)
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_(averages, changes)
        for average, value in self._others:
            average.copy_(value)

    def live(self) -> dict[str, Tensor]:
        """A copy of the module's present state."""
        return {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def put(self, state: Mapping[str, Tensor]) -> None:
        """Puts a state into the module."""
        for name, value in state.items():
            self._live[name].copy_(value)

    def save(self, file: Path) -> None:
        """Writes all that a resumed training goes on from."""
        tensors = {name: value.contiguous().clone() for name, value in self.state.items()}
        save_file({**tensors, _UPDATES: self.updates}, file)
        share(file)

    def load(self, file: Path) -> None:
        """Reads it."""
        saved = load_file(file)
        self.updates.copy_(saved.pop(_UPDATES))
        for name, value in self.state.items():
            value.copy_(saved[name])


class AveragingCallback(TrainerCallback):
    """Begins an average with each training and takes in every step; added after the `StepGuard`."""

    def __init__(self, trainer: AveragingMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.begin_average(state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        trainer = self.trainer
        if trainer.average is not None:
            skipped = trainer.guard.skips | trainer.accelerator.optimizer_step_was_skipped
            trainer.average.update(skipped)


class AveragingMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` for `training.ema`."""

    guard: StepGuard
    average: Average | None = None
    _average_from: Path | None = None  # the checkpoint that training goes on from
    _raw: dict[str, Tensor] | None = None  # the last weights, where the student has the average
    _choice: dict[str, Any]

    def average_weights(self) -> None:
        """Called once, by the constructor.

        Raises:
            InputError: where no process has whole weights.
        """
        self._choice = {}
        if not self.args.ema:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "training.ema: averages whole weights, which FSDP and DeepSpeed hold in parts; leave it out, or use "
                "DDP"
            )
        self.add_callback(AveragingCallback(self))

    def _init_training_state(
        self, max_steps: int, per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        self.average, self._raw, self._choice = None, None, {}
        self._average_from = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        given = max_steps, per_epoch, epochs, resume_from_checkpoint, trial
        found: tuple[int, int] = super()._init_training_state(*given)
        if self._average_from is not None and (self._average_from / AVERAGE_FILE).is_file() != bool(self.args.ema):
            with_or_without = "without" if self.args.ema else "with"
            raise InputError(
                f"{self._average_from}: saved {with_or_without} training.ema; resume it the same way, or start over"
            )
        return found

    def begin_average(self, steps: int) -> None:
        """Begins the average of a training of so many steps, or goes on with that of the checkpoint."""
        decay = decay_of(cast(float | str, self.args.ema), steps)
        horizon = 1 / (1 - decay)
        if horizon > LONG * steps * (1 + 1e-9) and self.args.process_index == 0:
            logger.warning(
                "training.ema: a decay of %.6g averages over about %.0f of the %d steps, more than a tenth: it lags "
                "behind; lower it, or train longer",
                *(decay, horizon, steps),
            )
        self.average = Average(self.student, decay)
        if self._average_from is not None:
            self.average.load(self._average_from / AVERAGE_FILE)

    def choose_weights(self) -> None:
        """Gives the student the better ones of its last weights (or the best checkpoint's) and their average."""
        average, dataset = self.average, self.eval_dataset
        if average is None:
            return
        dataset = next(iter(dataset.values()), None) if isinstance(dataset, dict) else dataset
        self._choice = {"decay": average.decay, "chosen": RAW, "on": ""}
        if self.task.takes_labels and self.distiller.objective.task_weight == 0:
            self._choice["why"] = "nothing trains what a score would be of"
        elif dataset is None:
            self._choice["why"] = "no validation split to choose on"
        else:
            self._choose(average, dataset)
        if self.args.process_index == 0:
            logger.warning("training.ema: %s", ema_line(self._choice))

    def _choose(self, average: Average, dataset: Any) -> None:
        raw = average.live()
        scores = {RAW: self._validated(dataset)}
        if self.args.world_size > 1:  # each process has BatchNorm statistics of its own
            share_state((value for value in average.state.values() if value.is_floating_point()), self.args.device)
        average.put(average.state)
        scores[EMA] = self._validated(dataset)
        asked = (self.args.metric_for_best_model or self.task.metric).removeprefix("eval_")
        metric = asked if asked in scores[RAW] else "loss"
        greater = self.args.greater_is_better if self.args.metric_for_best_model else self.task.greater_is_better
        sign = 1 if greater and metric != "loss" else -1
        values = {name: found.get(metric, math.nan) for name, found in scores.items()}
        chosen = EMA if sign * (values[EMA] - values[RAW]) > 0 or math.isnan(values[RAW]) else RAW
        if chosen == RAW:
            average.put(raw)
        else:
            self._raw = raw
        self._choice = {**self._choice, "chosen": chosen, "on": "validation", "metric": metric, "scores": scores}

    def _validated(self, dataset: Any) -> dict[str, float]:
        """The validation scores of the student as it is; no callback hears of it, and it is no part of the cost."""
        loader = self.get_eval_dataloader(dataset)
        metrics = self.evaluation_loop(loader, "Evaluation", metric_key_prefix="eval").metrics or {}
        found = {name.removeprefix("eval_"): float(value) for name, value in metrics.items()}
        return {name: value for name, value in found.items() if not name.endswith(("_time", "runtime", "_per_second"))}

    def ema_facts(self) -> dict[str, Any]:
        """Decay, scores of both, and which one the student has, as plain data; empty without `training.ema`."""
        return dict(self._choice)

    def scores_of(self, name: str) -> dict[str, Any]:
        """The validation scores of a student that is saved (`ema`, `raw`, or "": the student's own), as a fact."""
        scores = self._choice.get("scores", {})
        found = scores.get(name or self._choice.get("chosen"))
        return {} if found is None else {"scores": found}

    def students(self) -> dict[str, dict[str, Tensor]]:
        """The states that are saved beside the student's own, by the name of their folder."""
        found = {} if self.average is None else {EMA: self.average.state}
        return found if self._raw is None else {**found, RAW: self._raw}
