"""What the seed decides in a Trainer: the order of the data, and where in it a run is resumed."""

import sys
from pathlib import Path
from typing import Any

from transformers import TrainerState

from cankd_hf.names import STATE_FILE
from cankd_hf.training.base import TeachingTrainer


class SeedMixin(TeachingTrainer):
    """Methods of `CanKDTrainer` that replace those of `transformers.Trainer` for the order of the data."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.data_seed is None:
            # Otherwise accelerate takes the seed that torch was given last, by whomever.
            self.accelerator.dataloader_config.data_seed = self.args.seed

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Epochs and batches to skip. The Trainer takes all steps for one epoch, but a stream may have begun anew."""
        epochs, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        endless = num_train_epochs == sys.maxsize  # what the Trainer takes for data without a length
        if resume_from_checkpoint is None or not endless:
            return epochs, batches
        saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_FILE))
        # The Trainer counts the epochs of a stream right in `epoch`: passes + batches of this one / all batches.
        passes, part = divmod(saved.epoch or 0.0, 1.0)
        batches = (
            0 if self.args.ignore_data_skip else round(part * saved.max_steps * self.args.gradient_accumulation_steps)
        )
        return int(passes), batches
