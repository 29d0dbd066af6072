"""Run by torchrun from test_arithmetic: half the batch in each of two processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.training.tiny import Images, student, trainer, weights

folder = Path(sys.argv[1])
made = trainer(folder, Images(16, noisy=True), model=student(), per_device_train_batch_size=4)
if made.args.process_index == 1:
    # Ranks that start apart must be brought together.
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.1)
made.train()
save_file(weights(made), folder / f"rank{made.args.process_index}.safetensors")
scores = made.evaluate(Images(13))
if made.args.process_index == 0:
    (folder / "scores.txt").write_text(f"{scores['eval_miou']}")

# Ends without gloo's teardown, in which the first process to leave can abort the other.
(folder / f"done{made.args.process_index}").touch()
end = time.monotonic() + 60
while not (folder / f"done{1 - made.args.process_index}").exists() and time.monotonic() < end:
    time.sleep(0.02)
os._exit(0)
