"""Masks of objects: read from COCO json, metadata.jsonl, YOLO and tables, checked, and decoded per sample."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.load import DetectionData, load_detection
from cankd_hf.errors import InputError
from cankd_hf.run_lengths import encoded

HEIGHT, WIDTH = 40, 60
POLYGON = [[5, 5, 30, 5, 30, 30, 5, 30]]
BAR = np.zeros((1, HEIGHT, WIDTH), bool)
BAR[:, 3:9, 10:20] = True
COMPRESSED = {"size": [HEIGHT, WIDTH], "counts": encoded(BAR)[0].decode()}
NAMES = {"0": "cat", "1": "dog"}


def plain_counts(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, counted one pixel after the other."""
    counts, value = [0], False
    for pixel in mask.T.reshape(-1).tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


UNCOMPRESSED = plain_counts(BAR[0])


def objects(**changes: Any) -> dict[str, Any]:
    entry = {"image_id": 0, "category_id": 1, "bbox": [5, 5, 25, 25], "segmentation": POLYGON, "iscrowd": 0}
    return {key: value for key, value in {**entry, **changes}.items() if value != "none"}


def coco(root: Path, entries: list[dict[str, Any]], images: int = 3) -> Path:
    """A set as Roboflow exports it."""
    random = np.random.default_rng(0)
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True)
        listed = []
        for number in range(images):
            picture = Image.fromarray(random.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
            picture.save(root / split / f"{split}{number}.png")
            listed.append({"id": number, "file_name": f"{split}{number}.png", "width": WIDTH, "height": HEIGHT})
        written = [{"id": 1 + place, **entry} for place, entry in enumerate(entries)]
        content = {"images": listed, "annotations": written}
        content["categories"] = [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def opened(root: Path, **settings: Any) -> DetectionData:
    return load_detection(DataConfig(path=str(root), check="none", **settings), masked=True)


def seen(data: DetectionData, index: int) -> list[Any]:
    """Class, crowd, pixels and area of each object of a training image."""
    found = data.train.raw(index).label
    pixels = found.masks().flatten(1).sum(1).tolist()
    return list(zip(found.classes.tolist(), found.iscrowd.tolist(), pixels, found.area.tolist(), strict=True))


def test_coco_masks_of_every_form(tmp_path: Path) -> None:
    bar = {"category_id": 5, "bbox": [10, 3, 10, 6]}
    entries = [
        objects(area=625),
        objects(**bar, segmentation=COMPRESSED),
        objects(**bar, image_id=1, segmentation=UNCOMPRESSED, iscrowd=1, area=60),
        objects(**{**bar, "bbox": "none"}, image_id=1, segmentation=UNCOMPRESSED),
        objects(image_id=2, segmentation=[*POLYGON, [40, 10, 50, 10, 50, 20, 40, 20]]),
    ]
    data = opened(coco(tmp_path, entries))
    assert seen(data, 0) == [(0, 0, 625, 625.0), (1, 0, 60, 60.0)]
    assert seen(data, 1) == [(1, 1, 60, 60.0), (1, 0, 60, 60.0)]
    assert seen(data, 2) == [(0, 0, 725, 725.0)], "two polygons are one object"
    assert data.train.raw(1).label.boxes[1].tolist() == [10, 3, 20, 9], "the box around the mask"
    mask = data.train.raw(0).label.masks()[1].numpy()
    assert (mask == BAR[0]).all()
    label = data.eval[1]["labels"]
    assert label["masks"].shape == (2, HEIGHT, WIDTH) and label["iscrowd"].tolist() == [1, 0]
    assert pickle.loads(pickle.dumps(data.train.source)).load(0).label.outlines == data.train.raw(0).label.outlines


def test_masks_are_kept_as_outlines(tmp_path: Path) -> None:
    """Not as pixels: 200 objects of one image take some hundred bytes each."""
    data = opened(coco(tmp_path, [objects() for _ in range(200)], images=1))
    assert len(pickle.dumps(data.train.source)) < 200 * 500 < HEIGHT * WIDTH * 200
    assert len(pickle.dumps(data.train.raw(0).label)) < 200 * 200


BAD = {
    "no mask": (objects(segmentation="none"), "got none"),
    "null": (objects(segmentation=None), "got none"),
    "empty": (objects(segmentation=[]), "got none"),
    "two corners": (objects(segmentation=[[1, 2, 3, 4]]), r"expected polygons .* got \[\[1, 2, 3, 4\]\]"),
    "odd numbers": (objects(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "expected polygons"),
    "text": (objects(segmentation="outline"), "expected polygons .* got 'outline'"),
    "no size": (objects(segmentation={"counts": [3, 4]}), "run lengths"),
    "no counts": (objects(segmentation={"size": [HEIGHT, WIDTH]}), "run lengths"),
    "a bomb": (objects(bbox="none", segmentation={"size": [10**6, 10**6], "counts": [10**12]}), "run lengths"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_mask_that_is_none_is_told_before_any_image_is_read(kind: str, tmp_path: Path) -> None:
    entry, said = BAD[kind]
    root = coco(tmp_path, [objects(), entry])
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match=f"train0.png box 1: .*{said}") as caught:
        opened(root)
    assert len(caught.value.problems) == 2, "one for each split"


def test_several_problems_are_told_at_once_and_skipped_if_wanted(tmp_path: Path) -> None:
    root = coco(tmp_path, [objects(), *(entry for entry, _ in BAD.values())])
    with pytest.raises(InputError) as caught:
        opened(root)
    assert len(caught.value.problems) == 2 * len(BAD)
    data = opened(root, on_error="skip")
    assert seen(data, 0) == [(0, 0, 625, 625.0)]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            {"size": [HEIGHT + 1, WIDTH], "counts": UNCOMPRESSED["counts"]},
            "of the size .41, 60., of an image of 40 x 60",
        ),
        ({"size": [WIDTH, HEIGHT], "counts": COMPRESSED["counts"]}, "of the size .60, 40., of an image of 40 x 60"),
        ({"size": [HEIGHT, WIDTH], "counts": [3, 4]}, "decoded 7 pixels but expected 2400"),
        ({"size": [HEIGHT, WIDTH], "counts": "zzz"}, "nvalid RLE"),
    ],
)
def test_a_mask_of_another_size_is_no_mask_of_the_image(shape: Any, said: str, tmp_path: Path) -> None:
    root = coco(tmp_path, [objects(), objects(segmentation=shape)])
    with pytest.raises(InputError, match=f"train0.png mask 1: .*{said}"):
        load_detection(DataConfig(path=str(root)), masked=True)
    assert len(seen(opened(root, on_error="skip"), 0)) == 1


def test_a_mask_without_a_pixel_is_left_out_and_counted(tmp_path: Path) -> None:
    outside = objects(segmentation=[[100, 100, 120, 100, 120, 120]])
    data = load_detection(DataConfig(path=str(coco(tmp_path, [objects(), outside]))), masked=True)
    assert len(seen(data, 0)) == 1
    assert data.facts["dropped_boxes"]["files"]["train/train0.png"] == [
        "train/train0.png mask 1: no area in the image of 60 x 40"
    ]


def test_a_mask_far_from_its_box_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As of outlines for another size of the picture."""
    far = objects(bbox=[40, 30, 15, 8])
    load_detection(DataConfig(path=str(coco(tmp_path, [objects(), far]))), masked=True)
    assert "mask 1: it covers [5, 5, 25, 25], far from its box [40, 30, 15, 8]" in caplog.text
    assert "mask 0" not in caplog.text


def test_boxes_alone_are_refused_in_one_line(tmp_path: Path) -> None:
    root = coco(tmp_path / "coco", [objects(segmentation="none")])
    with pytest.raises(InputError, match="expected objects with masks .* got boxes alone.*task: detection") as caught:
        opened(root)
    assert len(set(caught.value.problems)) == 1


def test_masks_of_metadata_follow_exif(tmp_path: Path) -> None:
    """Outlines are in pixels of the upright picture, as boxes are."""
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        turned = Image.new("RGB", (HEIGHT, WIDTH))  # stored lying on its side
        exif = Image.Exif()
        exif[0x0112] = 6
        turned.save(tmp_path / split / f"{split}.jpg", exif=exif)
        lists = {"category": [0, "dog"], "segmentation": [POLYGON, COMPRESSED]}
        line = {"file_name": f"{split}.jpg", "objects": lists}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "labels.json").write_text(json.dumps({"id2label": NAMES}))
    data = opened(tmp_path)
    assert data.train.raw(0).image.shape[-2:] == (HEIGHT, WIDTH)
    assert seen(data, 0) == [(0, 0, 625, 625.0), (1, 0, 60, 60.0)]
    assert data.train.raw(0).label.boxes.tolist() == [[5, 5, 30, 30], [10, 3, 20, 9]]


def test_yolo_outlines(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new("RGB", (WIDTH, HEIGHT), split == "val" and "red" or "blue").save(tmp_path / f"images/{split}/a.png")
        lines = "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n1 0.6 0.6 0.9 0.6 0.9 0.9 0.6 0.9\n"
        (tmp_path / f"labels/{split}/a.txt").write_text(lines)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    assert seen(opened(tmp_path), 0) == [(0, 0, 384, 384.0), (1, 0, 216, 216.0)]


def test_tables(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": Image.new("RGB", (WIDTH, HEIGHT), colour), "objects": {"bbox": [[5, 5, 25, 25]], "category": [1]}}
        for colour in ("red", "blue")
    ]
    for row in rows:
        row["objects"]["segmentation"] = [POLYGON]
    tables = {
        split: datasets.Dataset.from_list([row]) for split, row in zip(("train", "validation"), rows, strict=True)
    }
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "with"))
    assert seen(opened(tmp_path / "with", num_labels=2), 0) == [(1, 0, 625, 625.0)]
    for row in rows:
        del row["objects"]["segmentation"]
    tables = {name: datasets.Dataset.from_list([row]) for name, row in zip(tables, rows, strict=True)}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "without"))
    with pytest.raises(InputError, match="got boxes alone"):
        opened(tmp_path / "without", num_labels=2)


def test_generated_objects_are_what_is_seen_of_each(tmp_path: Path) -> None:
    config = DataConfig(path="shapes", generated={"train": 6, "validation": 2, "test": 2})
    data, classes = load_detection(config, masked=True), load_detection(config, masked=True).id2label
    boxes = load_detection(config)  # of the same objects, for a task that reads no masks
    assert torch.equal(boxes.eval[1]["labels"]["boxes"], data.eval[1]["labels"]["boxes"])
    assert "masks" not in boxes.train[0]["labels"] and boxes.id2label == classes
    assert classes == {0: "disc", 1: "ring", 2: "square", 3: "triangle", 4: "star"}
    for index in range(6):
        masks = data.train.raw(index).label.masks()
        assert int(masks.sum(0).max()) == 1, "no pixel belongs to two objects"
        (whole,) = {tuple(mask.shape) for mask in masks}
        assert whole == (96, 96) and int(masks.flatten(1).sum(1).min()) >= 12
