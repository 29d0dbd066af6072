"""Weights and outputs of a student that are not finite: refused, on all processes alike."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cankd_hf.errors import InputError
from cankd_hf.models.finite import named, not_finite
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.base import TeachingTrainer

# What scores are computed of: outputs of models, beside `feature_maps`. A NaN in any of them may pass as no answer, as
# it is above no threshold. Rows that stand for no detection are finite.
ANSWERS = (
    *("logits", "pred_boxes", "predicted_depth"),
    *("pred_masks", "class_queries_logits", "masks_queries_logits"),  # of objects
)


class ScoreGuard:
    """Refuses to train, save or score a student whose weights or outputs are not finite."""

    def __init__(self, trainer: TeachingTrainer) -> None:
        self.trainer = trainer
        self.args: CanKDConfig = trainer.args
        self._scored: Tensor | None = None

    def last_checkpoint(self, step: int) -> str:
        """The newest checkpoint up to a step, for the end of a message."""
        found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(self.args.output_dir or "").glob("*")]
        steps = [int(match[1]) for match in found if match is not None and int(match[1]) <= step]
        return f"; the last good checkpoint is {self.args.output_dir}/checkpoint-{max(steps)}" if steps else ""

    def check_weights(self, purpose: str) -> None:
        """Raises InputError on all processes if a weight or BatchNorm statistic on any of them is not finite."""
        module = self.trainer.distiller
        kept = {name: value for name, value in module.named_buffers() if "running_" in name}
        bad = not_finite({**dict(module.named_parameters()), **kept})
        if self.anywhere(bool(bad)):
            bad = bad or ["a part on another process"]
            name = self.trainer.student.name_or_path or "student"
            last = self.last_checkpoint(self.trainer.state.global_step - 1)
            names = [one.removeprefix("student.") for one in bad]
            hint = "lower training.learning_rate and " if self.trainer.state.global_step else ""
            raise InputError(
                f"{name}: expected finite weights {purpose}, got {named(names)}; {hint}train it anew{last}"
            )

    def anywhere(self, here: bool) -> bool:
        """Whether it is so on any process."""
        if self.args.world_size == 1:
            return here
        flag = torch.tensor(int(here), device=self.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def begin_scoring(self) -> None:
        """Before an evaluation: the weights are checked."""
        self.check_weights("to score")
        self._scored = torch.zeros(2, dtype=torch.int64, device=self.args.device)

    @torch.no_grad()
    def see_answers(self, outputs: Any) -> None:
        """The output of a `Distiller`, or what a `compute_loss` of the user returns, for a batch of evaluation."""
        own = outputs if isinstance(outputs, Mapping) else {}
        inner = own["outputs"] if isinstance(own.get("outputs"), Mapping) else own
        answers = [inner.get(name, own.get(name)) for name in ANSWERS]
        values = [*answers, *(inner.get("feature_maps") or ())]
        flags = [bad_images(value, mask=True) for value in values if isinstance(value, Tensor)]
        if flags and self._scored is not None:
            there = self._scored.device  # a model may answer on the host
            bad = torch.stack([flag.to(there, non_blocking=there.type != "cpu") for flag in flags]).any(0)
            self._scored += torch.stack([bad.sum(), torch.ones_like(bad, dtype=torch.int64).sum()])

    def end_scoring(self) -> None:
        """After an evaluation. Raises InputError if an output was not finite."""
        assert self._scored is not None
        scored, self._scored = self._scored, None
        if self.args.world_size > 1:
            torch.distributed.all_reduce(scored)
        bad, images = scored.tolist()
        if bad:
            # Several processes score some images twice, to be even.
            which = f"{bad} of {images}" if self.args.world_size == 1 else "some"
            raise InputError(
                f"{self.trainer.student.name_or_path or 'student'}: expected finite outputs to score, got NaN or "
                f"infinity for {which} images; lower training.learning_rate and train it anew"
                f"{self.last_checkpoint(self.trainer.state.global_step - 1)}"
            )


def bad_images(value: Tensor, mask: bool) -> Tensor:
    """Which images of `[B, ...]` are not finite, bool [B]; with `mask`, minus infinity masks out and is allowed."""
    values = value.flatten(1)
    if not values.shape[1]:
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    largest = values.amax(1)  # a NaN is larger than any number, and smaller
    if mask:
        return torch.isnan(largest) | torch.isposinf(largest)
    return ~(torch.isfinite(largest) & torch.isfinite(values.amin(1)))
