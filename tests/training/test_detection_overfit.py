"""Each detection head learns 8 real images by heart: read by our data code, scored by our metric."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.detection.collate import original_objects, original_sizes
from cankd_hf.metrics.detection import detection_scores, detection_statistics
from cankd_hf.tasks.detection import DetectionTask
from cankd_hf.tasks.detection_outputs import detections

STEPS = {"retinanet": 300, "fcos": 300, "faster_rcnn": 200, "cascade_rcnn": 200, "reppoints": 400}
BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
# Platelets are some 20 pixels wide here: anchors begin there.
HEADS: dict[str, dict[str, Any]] = {
    "retinanet": {"head_layers": 2, "anchor_scale": 2.5, "norm": "group"},
    "fcos": {"head_layers": 2},
    "faster_rcnn": {"head_channels": 128, "anchor_scale": 5.0},
    "cascade_rcnn": {"head_channels": 128, "anchor_scale": 5.0},
    "reppoints": {"head_layers": 2},
}


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("head", HEADS)
def test_overfits_eight_images(head: str, shared_data: Path) -> None:
    config = DataConfig(
        path=str(shared_data / "bccd"), eval_split="train", image_size=[240, 320], max_eval_samples=8, check=8
    )
    task, data = DetectionTask.from_data(config, splits=["eval"])
    assert data.eval is not None and len(data.eval) == 8
    batch = task.collate([data.eval[i] for i in range(8)])
    images, labels = batch["pixel_values"], batch["labels"]
    model = task.build_student(StudentConfig(backbone=BACKBONE, fpn={"head": head, "fpn_channels": 32, **HEADS[head]}))

    steps, start = STEPS[head], time.perf_counter()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{head}: step {step}, loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start

    sizes = original_sizes(labels, *images.shape[-2:])
    with torch.no_grad():
        found = detections(model.eval()(images), sizes, "cankd_fpn")
    table = detection_statistics(found, [original_objects(*pair) for pair in zip(labels, sizes, strict=True)])
    scores = detection_scores(table, task.id2label)
    each = " ".join(f"{name} {scores[f'ap_{name}']:.3f}" for name in task.id2label.values())
    print(f"{head}: {steps} steps, loss {loss.item():.3f}, AP50 {scores['ap50']:.3f}, AP {scores['ap']:.3f} ({each})")
    print(f"{head}: {seconds:.0f} seconds")
    assert scores["ap50"] >= 0.9
