"""Run by torchrun from test_unlabelled_boxes: half the batch, with its unlabelled half, in each of two processes."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.processes import leave_together
from tests.training.detector_trainers import taught_trainer
from tests.training.tiny_trainers import weights

folder, rank = Path(sys.argv[1]), 0
for kind in ("retinanet", "conditional_detr"):
    made = taught_trainer(folder, kind, per_device_train_batch_size=4)
    made.train()
    rank = made.args.process_index
    save_file(weights(made), folder / f"{kind}{rank}.safetensors")
leave_together(folder, rank)
