"""Run by torchrun from test_arithmetic: half the batch in each of two processes, for each kind of student."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cankd_hf.training.trainer import CanKDTrainer
from tests.processes import leave_together
from tests.training.detector_trainers import STUDENTS, detector_trainer, scores
from tests.training.test_conditioning import conditioned_trainer
from tests.training.tiny_trainers import Images, of_shapes, student, trainer, weights


def train(made: CanKDTrainer, name: str) -> int:
    """Trains what both ranks made alike; ranks that start apart must be brought together. Returns the rank."""
    rank = made.args.process_index
    if rank == 1:
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.add_(0.1)
    made.train()
    save_file(weights(made), folder / f"{name}{rank}.safetensors")
    return rank


folder = Path(sys.argv[1])
made = trainer(folder, Images(16, noisy=True), model=student(), per_device_train_batch_size=4)
train(made, "fpn")
waits = [entry["data_wait"] for entry in made.state.log_history if "data_wait" in entry]
found = {"miou": made.evaluate(Images(13))["eval_miou"], "data_wait": waits}
train(conditioned_trainer(folder, 4), "conditioned")
train(of_shapes(folder, (1.0, 1.0), erase=[0.5], per_device_train_batch_size=4), "unlabelled")
for kind in STUDENTS:
    rank = train(detector_trainer(folder, kind, per_device_train_batch_size=4), kind)
found |= scores(folder, batch_size=2)
if rank == 0:
    (folder / "scores.json").write_text(json.dumps(found))
leave_together(folder, rank)
