"""`python -m cankd_hf.benchmark data [FOLDER]`: images read and augmented in a CPU second, beside others."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from cankd_hf.benchmark.measure import interleaved, table
from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.batch import BatchCollator
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.rows import Row
from cankd_hf.data.common.soft import SoftSource
from cankd_hf.data.common.views import SeededDataset, unnormalized
from cankd_hf.data.features.load import load_images
from cankd_hf.data.generated import SHAPE_CLASSES, ShapesSource
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError
from cankd_hf.json_text import to_json

HEIGHT, WIDTH = 360, 480  # of the images that are drawn where no folder is given
BATCH = 16
Item = dict[str, torch.Tensor]


def run_data(folder: str | None, crop: Sequence[int], images: int, repeats: int, console: Console) -> list[float]:
    """Prints milliseconds of CPU time an image; returns the ratios to the plain pipeline, with masks and without.

    Raises InputError for a folder that is no data set with masks.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            _draw(Path(scratch), images)
        square = DataConfig(path=folder or scratch, check="none", image_size=[224, 224], crop_size=[224, 224])
        masked = replace(square, image_size=list(crop), crop_size=list(crop), scale=[0.5, 2.0], soft_targets=False)
        soft = load_segmentation(replace(masked, soft_targets=True), splits=["train"]).train
        sets = {
            f"with masks, {crop[0]}x{crop[1]}": load_segmentation(masked, splits=["train"]).train,
            "without, 224x224": load_images(square, splits=["train"]).train,
        }
        rows: list[list[str]] = []
        ratios: list[float] = []
        for name, data in sets.items():
            count = min(images, len(data))
            forms = _forms(data, count)
            _compare(forms)
            if not ratios and isinstance(soft.source, SoftSource):  # the same images
                forms["ours, soft labels"] = _forms(soft, count)["ours"]
            turns = [partial(_through, make) for make in forms.values()]
            times = dict(zip(forms, interleaved(turns, repeats, torch.device("cpu"), time.process_time), strict=True))
            ours = times["ours"]
            over = {form: median(slow / fast for fast, slow in zip(ours, times[form], strict=True)) for form in times}
            ratios.append(over["plain"])
            for form, seconds in times.items():
                each = f"{min(seconds) / count * 1e3:.2f} ms"
                rows.append([name, form, each, f"{over[form]:.2f}x", f"{count / min(seconds):.0f}"])
    columns = ("images", "form", "an image", "over ours", "a second")
    console.print(
        table(f"CPU time of images read and augmented by one thread, in batches of {BATCH}", columns, rows, left=2)
    )
    if not find_spec("cv2"):
        console.print("OpenCV: not installed, so not timed (opencv-python-headless)")
    return ratios


def _through(make: Callable[[], Iterator[Any]]) -> None:
    """Makes all batches, and keeps one at a time, as training does."""
    for _ in make():
        pass


class _SeededAsOurs(SeededDataset):
    """A data set that is no slower to seed than ours."""

    def torch_only(self) -> bool:
        return True


def _forms(data: ImageDataset, count: int) -> dict[str, Callable[[], Iterator[Any]]]:
    """Each pipeline as a function that yields its batches."""
    seeded = SeededDataset(data, seed=0)
    collate = BatchCollator(segmentation_collate, torch.float32)

    def batches(items: Any, later: bool = False) -> Iterator[Any]:
        for first in range(0, count, BATCH):
            batch = collate([items[index] for index in range(first, min(first + BATCH, count))])
            yield batch.to("cpu") if later else batch

    def other(read: Callable[[ImageDataset, int], Item]) -> SeededDataset:
        return _SeededAsOurs(_Other(data, read), seed=0)

    forms: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: batches(unnormalized(seeded), later=True),
        "ours, bytes": lambda: batches(unnormalized(seeded)),
        "plain": lambda: batches(other(_plain)),
    }
    if find_spec("cv2"):
        forms["OpenCV"] = lambda: batches(other(_opencv))
    return forms


def _compare(forms: dict[str, Callable[[], Iterator[Any]]]) -> None:
    """Raises InputError if our pixels and labels are not those of the plain pipeline."""
    for ours, plain in zip(forms["ours"](), forms["plain"](), strict=True):
        if any(not torch.equal(ours[key], plain[key]) for key in plain.inputs):
            raise InputError("benchmark data: expected the plain pipeline's pixels, got others; report it")


class _Other:
    """The same files through another pipeline."""

    def __init__(self, data: ImageDataset, read: Callable[[ImageDataset, int], Item]) -> None:
        self.data, self.read = data, read

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        return self.read(self.data, index)


def _row(data: ImageDataset, index: int) -> Row:
    return data.source.rows[data.indices[index]]  # type: ignore[attr-defined,no-any-return]


def _plain(data: ImageDataset, index: int) -> Item:
    """The item as Pillow and torch give it: all of the image as a contiguous [3, H, W] before the crop."""
    row = _row(data, index)
    with Image.open(row.image) as picture:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
    if row.mask is None:
        return data.transform(image, None)
    with Image.open(row.mask) as picture:
        return data.transform(image, torch.from_numpy(np.array(picture)))


def _opencv(data: ImageDataset, index: int) -> Item:
    """The item as a loop of OpenCV calls makes it: our crop, resized without antialiasing where it is enlarged and by
    the mean over areas where it shrinks, in one thread, without any check."""
    cv2: Any = import_module("cv2")
    cv2.setNumThreads(1)
    row, transform = _row(data, index), data.transform
    steps, normalize = transform.augment.transforms, transform.normalize  # type: ignore[attr-defined]
    image = cv2.cvtColor(cv2.imread(str(row.image)), cv2.COLOR_BGR2RGB)
    found = steps[0].make_params([torch.empty(3, *image.shape[:2], device="meta")])
    (top, height), (left, width) = found["box"]
    rows, columns = found["inner"]
    (up, before), (canvas_rows, canvas_columns) = found["before"], steps[0].crop_size
    pads = up, canvas_rows - rows - up, before, canvas_columns - columns - before
    flipped = bool(torch.rand(()) < steps[1].p)

    def cut(pixels: np.ndarray, how: int, fill: Any) -> np.ndarray:
        part = cv2.resize(pixels[top : top + height, left : left + width], (columns, rows), interpolation=how)
        if any(pads):
            part = cv2.copyMakeBorder(part, *pads, cv2.BORDER_CONSTANT, value=fill)
        return cv2.flip(part, 1) if flipped else part  # type: ignore[no-any-return]

    smaller = cv2.INTER_AREA if rows < height else cv2.INTER_LINEAR
    values = cut(image, smaller, steps[0].background.flatten().tolist()).astype(np.float32)
    values -= np.float32(normalize.mean) * 255
    values /= np.float32(normalize.std) * 255
    item = {"pixel_values": torch.from_numpy(values).permute(2, 0, 1).contiguous()}
    if row.mask is not None:
        mask = cut(cv2.imread(str(row.mask), cv2.IMREAD_GRAYSCALE), cv2.INTER_NEAREST, steps[0].mask_fill)
        item["labels"] = torch.from_numpy(mask).long()
    return item


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
