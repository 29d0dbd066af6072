"""Tiny random teachers, and folders of images for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cankd_hf.config.student import StudentConfig
from cankd_hf.tasks import TASKS

BACKBONE = {
    **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "layer_type": "basic",
}
NAMES = {0: "red", 1: "green", 2: "blue"}


def save_teacher(folder: Path, task: str, head: str | None = None) -> Path:
    """Saves a random student of ours as a teacher, its outputs spread so that it is sure of some pixels."""
    torch.manual_seed(1)
    fpn = {"fpn_channels": 8, **({"head_channels": 8} if head is None else {"head": head, "head_layers": 1})}
    made = TASKS[task](NAMES) if head is not None else TASKS[task](NAMES, 255)  # type: ignore[call-arg]
    model = made.build_student(StudentConfig(backbone=dict(BACKBONE), fpn=fpn))
    if head is None:
        with torch.no_grad():
            last = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d) and part.out_channels == 3][
                -1
            ]
            last.weight *= 40
    else:
        model.config.score_threshold = 0.001
    model.save_pretrained(folder)
    stats = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 64, "width": 96}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stats))
    return folder


def save_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes blocks of colours on noise as PNG, 96 x 64."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        random = np.random.default_rng(1000 * seed + number)
        values = random.integers(0, 60, (64, 96, 3))
        for kind in range(3):
            y, x = random.integers(0, 40), random.integers(0, 70)
            values[y : y + 24, x : x + 26, kind] += 180
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("segmenter"), "segmentation")


@pytest.fixture(scope="session")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("detector"), "detection", "fcos")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return save_images(tmp_path / "photos", 6)
