"""The checkpoint methods of `CanKDTrainer`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cankd_hf.hub.facts import write_facts
from cankd_hf.names import RECIPE_FILE
from cankd_hf.teachers.health import TeacherHealth
from cankd_hf.training.base import TeachingTrainer
from cankd_hf.training.checkpoint import check_finite, check_teachers, load_checkpoint, save_distillation, split_state
from cankd_hf.training.facts import run_facts
from cankd_hf.training.monitoring.energy import EnergyMeter

logger = logging.getLogger(__name__)


class CheckpointMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for checkpoints."""

    recipe: str | None
    inherited: Sequence[str]
    energy: EnergyMeter
    health: TeacherHealth

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or "")
        student, rest = split_state(self.distiller.state_dict() if state_dict is None else state_dict)
        check_finite(folder, {**student, **rest})
        folder.mkdir(parents=True, exist_ok=True)
        self.student.save_pretrained(folder, state_dict=student)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.recipe is not None:
            (folder / RECIPE_FILE).write_text(self.recipe, encoding="utf-8")
        whole = not folder.name.startswith("checkpoint-")
        write_facts(folder, self._facts(best=whole))
        if not whole:
            save_distillation(folder, rest, self.teachers)

    def _facts(self, best: bool) -> dict[str, Any]:
        """Facts for the card of the saved student; `best`: it may be the best checkpoint, loaded at the end."""
        return run_facts(
            self.args, self.state, self.task, self.distiller, self.teachers, self.inherited, self.energy, best
        ) | {"teacher_findings": self.health.findings}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        check_teachers(Path(resume_from_checkpoint), self.teachers)
        load_checkpoint(self.distiller, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        logger.info("Loading the best model: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
