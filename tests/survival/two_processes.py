"""Run by torchrun: checkpoints of two processes, and training that goes on from the newest whole one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.processes import leave_together
from tests.training.tiny_trainers import largest_difference, trainer, weights

folder = Path(sys.argv[1])
settings = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
whole = trainer(folder / "whole", **settings)
whole.train()
rank = whole.args.process_index
cut = trainer(folder / "cut", **settings, save_total_limit=3)
cut.train()
cut.accelerator.wait_for_everyone()
if rank == 0:  # as if the last save had been cut off
    (folder / "cut" / "checkpoint-4" / f"rng_state_{1}.pth").unlink()
cut.accelerator.wait_for_everyone()
resumed = trainer(folder / "cut", **settings)
resumed.train(resume_from_checkpoint=True)
if rank == 0:
    found = {
        "difference": largest_difference(weights(whole), weights(resumed)),
        "steps": resumed.state.global_step,
        "folders": sorted(path.name for path in (folder / "cut").iterdir()),
        "files": sorted(json.loads((folder / "cut/checkpoint-3/checkpoint_files.json").read_text())["files"]),
    }
    (folder / "found.json").write_text(json.dumps(found))
leave_together(folder, rank)
