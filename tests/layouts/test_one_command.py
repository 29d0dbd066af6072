"""From a folder as people have it to a trained student in one command, which names nothing but the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from cankd_hf.train import main

from . import box_folders as boxes
from .folders import coloured, indexed, pairs, scene, turned

BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
TASKS: dict[str, dict[str, Any]] = {
    "segmentation": {"fpn_channels": 16, "head_channels": 16},
    "detection": {"head": "fcos", "fpn_channels": 32, "head_layers": 1},
}


def recipe(task: str, folder: Path) -> Path:
    """A recipe of a few steps that leaves the data open."""
    pyramid = TASKS[task]
    made = {"model_type": "cankd_fpn", "backbone_config": BACKBONE, **pyramid}
    content = {
        "task": task,
        "data": {"path": "???", "image_size": [64, 64], "crop_size": [64, 64], "scale": [1.0, 1.0]},
        "student": {"backbone": BACKBONE, "fpn": pyramid},
        "teacher": {"config": made, "fit": {"max_steps": 1}},
        "distill": {"terms": [{"loss": "cankd", "weight": 2.5, "pairs": [[0, 0]]}]},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "eval_strategy": "no"},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def images_and_masks(root: Path) -> None:
    """Masks of colours, mixed case, an image on its side, one without a mask and a mask without an image."""
    pairs(root / "Train" / "Images", root / "Train" / "Masks", write=coloured, stem="Bild {} ü")
    pairs(root / "Val" / "Images", root / "Val" / "Masks", count=2, write=coloured, first=10)
    picture, _ = scene(3)
    turned(root / "Train" / "Images" / "Bild 003 ü.jpg", picture)
    scene(20)[0].save(root / "Train" / "Images" / "ALONE.JPG", "JPEG")
    shutil.copy(root / "Val" / "Masks" / "010.png", root / "Val" / "Masks" / "stray.png")


def palette_masks(root: Path) -> None:
    """Palette PNGs, split folders below, no validation split."""
    pairs(root / "images", root / "labels", count=6, write=indexed)


def cityscapes(root: Path) -> None:
    """leftImg8bit/ and gtFine/, with the label ids of the original masks."""
    for number, (split, city) in enumerate([("train", "aachen"), ("train", "bochum"), ("val", "lindau")] * 2):
        image, mask = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        for folder in (image, mask):
            folder.mkdir(parents=True, exist_ok=True)
        picture, labels = scene(number)
        stem = f"{city}_{number:06d}_000019"
        picture.save(image / f"{stem}_leftImg8bit.png")
        Image.fromarray(labels + 7).save(mask / f"{stem}_gtFine_labelIds.png")


def ade20k(root: Path) -> None:
    """images/training and annotations/training."""
    for split, first in (("training", 0), ("validation", 4)):
        home = root / "ADEChallengeData2016"
        pairs(home / "images" / split, home / "annotations" / split, first=first, stem=f"ADE_{split}_{{}}")


def voc_masks(root: Path) -> None:
    """JPEGImages/, SegmentationClass/ and lists."""
    home = root / "VOC2012"
    palette = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    pairs(home / "JPEGImages", home / "SegmentationClass", 4, partial(indexed, colours=palette), stem="2007_000{}")
    lists = home / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000000\n2007_000001\n2007_000002\n")
    (lists / "val.txt").write_text("2007_000003\n")


def imagefolder(root: Path) -> None:
    """metadata.jsonl with objects."""
    for split in ("train", "val"):
        lines = []
        for picture in (one for one in boxes.PICTURES if one.split == split):
            picture.write(root / split)
            objects = {"bbox": [list(box) for box in picture.boxes], "category": list(picture.labels)}
            lines.append(json.dumps({"file_name": picture.name, "objects": objects}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    boxes.write_json(root / "labels.json", {"id2label": dict(enumerate(boxes.NAMES))})


def table(split: str) -> Any:
    """The pictures of a split as a data set."""
    import datasets

    names = datasets.ClassLabel(names=boxes.NAMES)
    item = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(names)}
    features = datasets.Features({"image": datasets.Image(), "objects": item})

    def rows() -> Iterator[dict[str, Any]]:
        import io
        import tempfile

        for picture in (one for one in boxes.PICTURES if one.split == split):
            with tempfile.TemporaryDirectory() as folder:
                content = picture.write(Path(folder)).read_bytes()
            objects = {"bbox": [list(box) for box in picture.boxes], "category": list(picture.labels)}
            yield {"image": {"bytes": io.BytesIO(content).getvalue(), "path": picture.name}, "objects": objects}

    return datasets.Dataset.from_list(list(rows()), features=features)


def parquet(root: Path) -> None:
    """data/train-00000-of-00001.parquet, as the Hub keeps it."""
    (root / "data").mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        table(split).to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")


FOLDERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "images and masks": ("segmentation", images_and_masks),
    "palette masks without splits": ("segmentation", palette_masks),
    "Cityscapes": ("segmentation", cityscapes),
    "ADE20K": ("segmentation", ade20k),
    "VOC masks": ("segmentation", voc_masks),
    "COCO outlines": ("segmentation", boxes.coco),
    "masks of Roboflow": ("segmentation", boxes.roboflow_masks),
    "YOLO outlines": ("segmentation", partial(boxes.yolo, polygon=True)),
    **{name: ("detection", make) for name, make in boxes.BOXES.items()},
    "imagefolder": ("detection", imagefolder),
    "parquet": ("detection", parquet),
}
DEFAULT = ("images and masks", "YOLO of Roboflow")  # the others take a second or two each


def train(task: str, tmp_path: Path, path: str, *more: str) -> dict[str, Any]:
    """Runs the command; returns its results."""
    out = tmp_path / "out"
    assert main([str(recipe(task, tmp_path)), f"data.path={path}", f"output_dir={out}", *more]) == 0
    assert (out / "model.safetensors").is_file()
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in DEFAULT else pytest.mark.slow) for one in FOLDERS]
)
def test_a_folder_becomes_a_student(name: str, tmp_path: Path) -> None:
    task, make = FOLDERS[name]
    root = tmp_path / "Meine Daten é"
    root.mkdir()
    make(root)
    train(task, tmp_path, str(root))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_set_becomes_a_student(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(path: str, *_: Any, streaming: bool, **__: Any) -> Any:
        assert path == "someone/cells"
        splits = {"train": table("train"), "validation": table("val")}
        return {name: split.to_iterable_dataset() if streaming else split for name, split in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train("detection", tmp_path, "someone/cells", f"data.streaming={str(streaming).lower()}")


def test_three_things_that_are_missing_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "Meine Daten é"
    root.mkdir()
    boxes.roboflow_yolo(root)
    (root / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnc: 4\nnames: [a, b, c]\n")
    shutil.rmtree(root / "valid")
    (root / "train" / "labels" / "a.b.txt").write_text("0 0.5 0.5\n")
    assert main([str(recipe("detection", tmp_path)), f"data.path={root}", f"output_dir={tmp_path / 'out'}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    for said in ("data.yaml: nc: expected 3", "data.yaml: val: expected a folder", "train/labels/a.b.txt line 1"):
        assert sum(said in line for line in lines) == 1, lines
