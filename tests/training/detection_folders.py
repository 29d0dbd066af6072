"""A tiny detection set of coloured boxes on noise, as a folder of images with metadata.jsonl."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = {"0": "red", "1": "green", "2": "blue"}


def write_boxes(folder: Path, train: int = 8, others: int = 3, size: tuple[int, int] = (64, 96)) -> Path:
    """Writes train/, val/ and test/ under `folder` and returns it; the class of a box is its colour."""
    random = np.random.default_rng(7)
    height, width = size
    for split, count in (("train", train), ("val", others), ("test", others)):
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            image = random.integers(90, 130, (height, width, 3), dtype=np.uint8)
            boxes, classes = [], []
            for side in range(2):
                kind, w, h = int(random.integers(3)), int(random.integers(16, 40)), int(random.integers(16, 40))
                x, y = side * width // 2 + int(random.integers(0, width // 2 - w)), int(random.integers(0, height - h))
                image[y : y + h, x : x + w] = np.eye(3, dtype=np.uint8)[kind] * 230
                boxes.append([x, y, w, h])
                classes.append(kind)
            Image.fromarray(image).save(folder / split / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "objects": {"bbox": boxes, "category": classes}}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "labels.json").write_text(json.dumps({"id2label": NAMES}))
    return folder


def write_coco(folder: Path, splits: Mapping[str, str]) -> Path:
    """The same pictures as COCO has them, with outlines: `splits` names those of `write_boxes` anew; category ids have
    gaps."""
    write_boxes(folder)
    (folder / "labels.json").unlink()
    shutil.rmtree(folder / "test")
    (folder / "annotations").mkdir()
    categories = [{"id": 1 + 40 * int(number), "name": name} for number, name in NAMES.items()]
    for given, split in splits.items():
        images, annotations = [], []
        for number, line in enumerate((folder / given / "metadata.jsonl").read_text().splitlines()):
            entry = json.loads(line)
            width, height = Image.open(folder / given / entry["file_name"]).size
            images.append({"id": number, "file_name": entry["file_name"], "width": width, "height": height})
            for box, kind in zip(entry["objects"]["bbox"], entry["objects"]["category"], strict=True):
                place = {"id": len(annotations), "image_id": number, "category_id": 1 + 40 * kind}
                x, y, w, h = box
                outline = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append({**place, "bbox": box, "area": w * h, "iscrowd": 0, "segmentation": [outline]})
        (folder / given / "metadata.jsonl").unlink()
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (folder / given).rename(folder / split)
    return folder
