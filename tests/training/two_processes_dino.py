"""Run by torchrun from test_dino_runs: half the batch in each of two processes."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.processes import leave_together
from tests.training.detector_trainers import detector_trainer
from tests.training.tiny_trainers import weights

folder = Path(sys.argv[1])
made = detector_trainer(folder, "dino", per_device_train_batch_size=4)
made.train()
save_file(weights(made), folder / f"dino{made.args.process_index}.safetensors")
leave_together(folder, made.args.process_index)
