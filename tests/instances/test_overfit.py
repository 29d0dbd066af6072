"""Students with masks learn 8 generated images by heart: read by our data code, scored by our metric."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.seeds import seeded
from cankd_hf.tasks import TASKS

BACKBONE = {
    **{"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
    "layer_type": "basic",
}
HEADS: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"head_channels": 128, "anchor_scale": 4.0},
    "cascade_rcnn": {"head_channels": 128, "anchor_scale": 4.0},
}
STEPS = 240  # of four images each


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("head", HEADS)
def test_overfits_eight_images(head: str) -> None:
    sizes = {"train": 8, "validation": 8, "test": 1, "size": 96}
    config = DataConfig(path="shapes", generated=sizes, eval_split="train", image_size=[128, 128])
    task, data = TASKS["instance-segmentation"].from_data(config, splits=["eval"])
    batch = task.collate([data.eval[i] for i in range(8)])
    inputs = task.model_inputs(batch)
    with seeded(0):
        model = task.build_student(
            StudentConfig(backbone=BACKBONE, fpn={"head": head, "fpn_channels": 32, **HEADS[head]})
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS, pct_start=0.2)
        for step in range(STEPS):
            half = slice(4 * (step % 2), 4 * (step % 2) + 4)
            loss = model(inputs["pixel_values"][half], labels=inputs["labels"][half]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                print(f"{head}: step {step}, loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        output = model.eval()(**inputs)
    found = task.statistics({"outputs": output}, batch, model)
    scores = task.scores({name: values.numpy() for name, values in found.items()})
    named = ", ".join(f"{name} {scores[name]:.3f}" for name in ("mask_ap50", "mask_ap", "ap50", "ap"))
    print(f"{head}: {STEPS} steps, loss {loss.item():.3f}, {named}")
    assert scores["mask_ap50"] >= 0.9 and scores["ap50"] >= 0.9
