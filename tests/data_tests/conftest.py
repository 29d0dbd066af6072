"""Small sets on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = {"0": "ground", "1": "cat", "2": "dog"}


def picture(seed: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    """An RGB picture of noise, width x height."""
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3))
    return Image.fromarray(values.astype(np.uint8))


def mask(seed: int, size: tuple[int, int] = (24, 18), high: int = 3) -> Image.Image:
    """A mask with the labels below `high`, width x height."""
    values = np.random.default_rng(seed).integers(0, high, (size[1], size[0]))
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes an imagefolder set with metadata.jsonl; returns its root."""

    def make(train: int = 4, val: int = 2, labels: dict[str, Any] | None = None) -> Path:
        root = tmp_path / "set"
        for split, count in (("train", train), ("val", val)):
            lines = []
            for kind in ("images", "masks"):
                (root / split / kind).mkdir(parents=True)
            for index in range(count):
                seed = index + 100 * (split == "val")
                picture(seed).save(root / split / "images" / f"{index}.png")
                mask(seed).save(root / split / "masks" / f"{index}.png")
                lines.append({"file_name": f"images/{index}.png", "mask_file_name": f"masks/{index}.png"})
            (root / split / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        (root / "labels.json").write_text(json.dumps(labels or {"id2label": NAMES}))
        return root

    return make
