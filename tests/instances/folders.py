"""Tiny data sets with masks on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

NAMES = ["red", "green", "blue"]


def write_instances(folder: Path, train: int = 4, others: int = 2, size: tuple[int, int] = (64, 96)) -> Path:
    """COCO's folders under `folder`: an ellipse in each half of a picture, whose colour is its class; the last picture
    of a split shows nothing, and the first has a crowd beside its objects."""
    random = np.random.default_rng(7)
    height, width = size
    most = min(height, width // 2)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", others)):
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for number in range(count):
            page = Image.fromarray(random.integers(90, 130, (height, width, 3), dtype=np.uint8))
            images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
            for half in range(2 if number + 1 < count else 0):
                kind, (w, h) = int(random.integers(3)), random.integers(2 * most // 5, 4 * most // 5, 2).tolist()
                x, y = half * width // 2 + int(random.integers(0, width // 2 - w)), int(random.integers(0, height - h))
                ImageDraw.Draw(page).ellipse((x, y, x + w, y + h), tuple(230 * (np.arange(3) == kind)))
                angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
                ring = np.stack([x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)], 1)
                entry = {"image_id": number, "category_id": 1 + kind, "bbox": [x, y, w, h], "area": w * h * 0.785}
                found.append({"id": len(found) + 1, **entry, "iscrowd": 0, "segmentation": [ring.flatten().tolist()]})
            if number == 0:
                crowd = {"size": [height, width], "counts": [0, 10 * height, (width - 10) * height]}
                entry = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 10, height], "area": 10 * height}
                found.append({"id": len(found) + 1, **entry, "iscrowd": 1, "segmentation": crowd})
            page.save(folder / split / f"{number}.png")
        categories = [{"id": place, "name": name} for place, name in enumerate(NAMES, start=1)]
        content = {"images": images, "annotations": found, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder
