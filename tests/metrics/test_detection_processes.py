"""The Trainer's own evaluation gives the same detection scores in one process and in two (run by torchrun)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from cankd_hf.metrics.detection import detection_scores, detection_statistics

NAMES = {0: "cat", 1: "dog", 2: "emu"}
IMAGES = 13


def table(index: int) -> torch.Tensor:
    """[1, R, 7] of one image, R differing from image to image."""
    generator = torch.Generator().manual_seed(index)
    count = index % 5
    corner = torch.rand(count, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=generator) * 99], 1)
    labels = torch.randint(0, 3, (count,), generator=generator)
    guessed = torch.where(torch.rand(count, generator=generator) < 0.8, labels, (labels + 1) % 3)
    found = {
        "boxes": boxes + torch.randn(count, 4, generator=generator) * 4,
        "labels": guessed,
        "scores": one_hot(guessed, 3).float().mean(1) + torch.randint(0, 3, (count,), generator=generator) / 9,
    }
    return detection_statistics([found], [{"boxes": boxes, "class_labels": labels}], max_detections=8)


def evaluate(folder: str, batch_size: int) -> dict[str, float]:
    """Scores of the 13 images by `Trainer.evaluate`."""
    from transformers import Trainer, TrainingArguments

    class Scored(Trainer):
        def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            tables = [table(int(index)) for index in inputs["index"]]
            rows = max(part.shape[1] for part in tables)
            padded = [nn.functional.pad(part, (0, 0, 0, rows - part.shape[1]), value=-100.0) for part in tables]
            return None, torch.cat(padded), torch.zeros(len(tables))

    arguments = TrainingArguments(
        folder, per_device_eval_batch_size=batch_size, use_cpu=True, remove_unused_columns=False, report_to="none"
    )
    trainer = Scored(
        nn.Linear(1, 1),
        arguments,
        eval_dataset=[{"index": index} for index in range(IMAGES)],
        compute_metrics=lambda prediction: detection_scores(prediction.predictions, NAMES),
    )
    scores = trainer.evaluate()
    return {key: value for key, value in scores.items() if key.startswith(("eval_ap", "eval_ar"))}


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    one = evaluate(str(tmp_path), batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    assert json.dumps(two) == json.dumps(one)  # bit for bit, nan beside nan
    assert 0.2 < one["eval_ap50"] < 0.95


if __name__ == "__main__":
    found_scores = evaluate(sys.argv[1], batch_size=2)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "two.json").write_text(json.dumps(found_scores))
    # Ends without gloo's teardown, in which the first process to leave can abort the other.
    rank = int(os.environ["RANK"])
    Path(sys.argv[1], f"done{rank}").touch()
    end = time.monotonic() + 60
    while not Path(sys.argv[1], f"done{1 - rank}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os._exit(0)
