"""`python -m cankd_hf.benchmark data --coco IMAGES`: seconds and memory until a set like COCO can be trained on."""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from cankd_hf.benchmark.measure import table
from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.load import load_detection

BOXES = 7.27  # an image, as in train2017 of COCO
PICTURES = 16  # different ones; the other files are hard links to them
CLASSES = 80
PART = 1000
# As many numbers as the outlines of COCO have in the mean: they are most of its json.
OUTLINE = json.dumps([[round(100 + 3.17 * number, 2) for number in range(44)]])


def run_large(images: int, check: str, console: Console) -> tuple[float, float]:
    """Writes a set with as many images and prints what opening and checking it takes; returns seconds and GiB.

    Args:
        images: of the training split; that for evaluation has a 24th of it.
        check: the `data.check`.
        console: for the table.
    """
    with tempfile.TemporaryDirectory() as scratch:
        size = write_coco(Path(scratch), images)
        before, wall, processor = _peak(), time.perf_counter(), time.process_time()
        counts = {"check": int(check) if check.isdecimal() else check}
        config = DataConfig(path=scratch, image_size=[320, 320], crop_size=[320, 320], **counts)  # type: ignore[arg-type]
        data = load_detection(config, splits=("train", "eval"))
        seconds, used = time.perf_counter() - wall, time.process_time() - processor
    peak = _peak()
    rows = [
        ("images, boxes", f"{len(data.train):,}, {len(data.train.source.annotations.boxes):,}"),
        ("annotations", f"{size / 2**20:.0f} MiB of json"),
        ("opened and checked", f"{seconds:.1f} s, {used:.1f} s of processor time"),
        ("images decoded", f"{data.facts['checked']:,}"),
        ("memory of the process at most", f"{peak:.2f} GiB, {before:.2f} GiB before it"),
    ]
    console.print(table(f"A set like COCO, data.check={check}", ("what", "measured"), rows))
    return seconds, peak


def write_coco(root: Path, images: int) -> int:
    """Writes images and json of two splits; returns the bytes of the training split's json."""
    random = np.random.default_rng(0)
    (root / "annotations").mkdir()
    (root / "pictures").mkdir()
    for number in range(PICTURES):
        noise = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(root / "pictures" / f"{number}.jpg", quality=90)
    for split, count in (("train", images), ("val", max(1, images // 24))):
        (root / split).mkdir()
        for number in range(count):
            os.link(root / "pictures" / f"{number % PICTURES}.jpg", root / split / f"{number:012d}.jpg")
        with (root / "annotations" / f"instances_{split}.json").open("w") as file:
            classes = [{"id": number + 1, "name": f"class {number}"} for number in range(CLASSES)]
            file.write(f'{{"categories": {json.dumps(classes)}, "images": [')
            for number in range(count):
                image = f'"id": {number}, "file_name": "{number:012d}.jpg", "width": 640, "height": 480'
                file.write(f"{', ' if number else ''}{{{image}}}")
            file.write('], "annotations": [')
            for number, entry in enumerate(_boxes(round(BOXES * count), count, random)):
                file.write(f"{', ' if number else ''}{entry}")
            file.write("]}")
    return (root / "annotations" / "instances_train.json").stat().st_size


def _boxes(total: int, images: int, random: np.random.Generator) -> Iterator[str]:
    """Entries of `annotations`, made some at a time, as the memory of this is measured too."""
    for first in range(0, total, PART):
        count = min(PART, total - first)
        owners, kinds = random.integers(0, images, count).tolist(), random.integers(1, CLASSES + 1, count).tolist()
        corners, sides = random.uniform(0, (400, 300), (count, 2)), random.uniform(5, (239, 179), (count, 2))
        boxes = np.concatenate([corners, sides], 1).round(2).tolist()
        for number, (owner, kind, box) in enumerate(zip(owners, kinds, boxes, strict=True), start=first):
            entry = f'"id": {number}, "image_id": {owner}, "category_id": {kind}, "bbox": {box}'
            yield f'{{{entry}, "area": {box[2] * box[3]:.3f}, "iscrowd": 0, "segmentation": {OUTLINE}}}'


def _peak() -> float:
    """The most memory that the process had so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
