"""Run by torchrun from test_ragged."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.processes import leave_together
from tests.training.ragged import scores, train_boxes
from tests.training.tiny_trainers import Images, terms, trainer

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found = {"scores": scores(folder), "boxes": train_boxes(folder, "stream", batch=2)}
few = trainer(folder, Images(1), per_device_train_batch_size=4)
few.train()
# Nothing counts in the first step of a warm-up: all processes go through it together.
warm = trainer(folder, Images(8), per_device_train_batch_size=4, task_weight=0.0, terms=terms(warmup=1.0))
warm.train()
found["steps"] = [few.state.global_step, warm.state.global_step]
(folder / f"found{rank}.json").write_text(json.dumps(found))
leave_together(folder, rank)
