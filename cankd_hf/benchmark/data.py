"""`python -m cankd_hf.benchmark data [FOLDER]`: images read and augmented in a CPU second, against Pillow."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from cankd_hf.benchmark.measure import interleaved, table
from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.seeds import seeded
from cankd_hf.data.features.load import load_images
from cankd_hf.data.generated import SHAPE_CLASSES, ShapesSource
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError
from cankd_hf.json_text import to_json

HEIGHT, WIDTH = 360, 480  # of the images that are drawn where no folder is given


def run_data(folder: str | None, crop: Sequence[int], images: int, repeats: int, console: Console) -> list[float]:
    """Prints milliseconds of CPU time an image; returns the ratios to the plain pipeline, with masks and without.

    Raises InputError for a folder that is no data set with masks.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            _draw(Path(scratch), images)
        square = DataConfig(path=folder or scratch, check="none", image_size=[224, 224], crop_size=[224, 224])
        masked = replace(square, image_size=list(crop), crop_size=list(crop), scale=[0.5, 2.0])
        sets = {
            f"image + mask, {crop[0]}x{crop[1]}": load_segmentation(masked, splits=["train"]).train,
            "image, 224x224": load_images(square, splits=["train"]).train,
        }
        rows, ratios = [], []
        for name, data in sets.items():
            count = min(images, len(data))
            ours, plain = _times(data, count, repeats)
            ratios.append(median(slow / fast for fast, slow in zip(ours, plain, strict=True)))
            each = [f"{min(times) / count * 1e3:.2f} ms" for times in (ours, plain)]
            rows.append([name, str(count), *each, f"{ratios[-1]:.2f}x", f"{count / min(ours):.0f}"])
    columns = ("read and augmented", "images", "ours", "plain", "ratio", "images a second")
    console.print(table("CPU time an image, one thread; the pixels of both are the same", columns, rows))
    return ratios


def _times(data: ImageDataset, count: int, repeats: int) -> list[list[float]]:
    """CPU seconds of our pipeline and of the plain one. Raises InputError if their items differ."""
    for index in range(count):
        with seeded(index):
            ours = data[index]
        with seeded(index):
            plain = _plain(data, index)
        if any(not torch.equal(ours[key], plain[key]) for key in plain):
            raise InputError(f"{data.name(index)}: expected the plain pipeline's pixels, got others; report it")

    def run(one: object) -> None:
        for index in range(count):
            with seeded(index):
                data[index] if one is data else _plain(data, index)

    return interleaved([lambda: run(data), lambda: run(None)], repeats, torch.device("cpu"), time.process_time)


def _plain(data: ImageDataset, index: int) -> dict[str, torch.Tensor]:
    """The item as Pillow and torch give it: all of the image as a contiguous [3, H, W] before the crop."""
    row = data.source.rows[data.indices[index]]  # type: ignore[attr-defined]
    with Image.open(row.image) as picture:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
    if not data.source.masked:  # type: ignore[attr-defined]
        return data.transform(image, None)
    with Image.open(row.mask) as picture:
        return data.transform(image, torch.from_numpy(np.array(picture)))


def _draw(root: Path, images: int) -> None:
    """Writes a data set of JPEGs with PNG masks."""
    (root / "labels.json").write_text(to_json({str(label): name for label, name in SHAPE_CLASSES.items()}))
    source = ShapesSource("train", images, max(HEIGHT, WIDTH))
    for kind in ("images", "masks"):
        (root / "train" / kind).mkdir(parents=True)
    for index in range(images):
        sample = source.load(index)
        pixels = sample.image[:, :HEIGHT, :WIDTH].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "train" / "images" / f"{index}.jpg", quality=90)
        Image.fromarray(sample.label[:HEIGHT, :WIDTH].numpy()).save(root / "train" / "masks" / f"{index}.png")
    names = [{"file_name": f"images/{index}.jpg", "mask_file_name": f"masks/{index}.png"} for index in range(images)]
    (root / "train" / "metadata.jsonl").write_text("".join(json.dumps(name) + "\n" for name in names))
