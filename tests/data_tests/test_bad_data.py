"""Boxes without area, images without masks, ids with gaps and settings that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.load import load_segmentation

from .bad_folders import COCO, boxes_folder, problems_of
from .conftest import NAMES

Make = Callable[..., Path]


EMPTY = [[5, 6, 7, 0], [5, 6, 0, 0], [40, 3, 1, 5], [40.5, 3, 0.5, 5]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["metadata", "coco", "table"])
def test_boxes_without_area_are_dropped_and_counted(
    tmp_path: Path, kind: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bbox = [EMPTY[0], [2, 3, 10, 8], *EMPTY[1:], [20, 10, 12, 9]]
    objects = {"bbox": bbox, "category": [0, 1, 0, 0, 0, 2], "area": [1, 2, 3, 4, 5, 6], "iscrowd": [0, 0, 0, 0, 0, 1]}
    root = boxes_folder(tmp_path / "set", [objects] + [{"bbox": [[1, 1, 5, 5]], "category": [0]}] * 2)
    config = DataConfig(path=str(root), streaming=streaming, flip=0.0, scale=[1, 1], image_size=[30, 40])
    if kind == "coco":
        config.annotations = COCO
        (root / "annotations").mkdir()
        for split in ("train", "val"):
            lines = [json.loads(line) for line in (root / split / "metadata.jsonl").read_text().splitlines()]
            images = [{"id": n, "file_name": line["file_name"]} for n, line in enumerate(lines)]
            notes = [
                {"image_id": n, "bbox": box, "category_id": line["objects"]["category"][k]}
                | {key: line["objects"][key][k] for key in ("area", "iscrowd") if key in line["objects"]}
                for n, line in enumerate(lines)
                for k, box in enumerate(line["objects"]["bbox"])
            ]
            categories = [{"id": int(key), "name": name} for key, name in NAMES.items()]
            content = {"images": images, "annotations": notes, "categories": categories}
            (root / COCO.format(split=split)).write_text(json.dumps(content))
    elif kind == "table":
        datasets = pytest.importorskip("datasets")
        rows = {
            "image": [str(root / "train" / f"{n}.png") for n in range(3)],
            "objects": [objects] + [{"bbox": [[1, 1, 5, 5]], "category": [0], "area": [25], "iscrowd": [0]}] * 2,
        }
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "saved")
        config.path, config.labels = str(tmp_path / "saved"), str(root / "labels.json")
    data = load_detection(config)
    assert len(list(data.eval)) == 3 if streaming else len(data.train) == len(data.eval) == 3
    trained = [item for item in data.train if len(item["labels"]["area"])] if streaming else [data.train[0]]
    scored = next(iter(data.eval)) if streaming else data.eval[0]
    assert scored["labels"]["area"].tolist() == [2, 6] and scored["labels"]["iscrowd"].tolist() == [0, 1]
    assert scored["labels"]["class_labels"].tolist() == [1, 2] and scored["labels"]["boxes"].shape == (2, 4)
    assert any(item["labels"]["area"].tolist() == [2] for item in trained)  # crowds are not learned
    if not streaming:
        assert data.facts["dropped_boxes"]["count"] == 8 and data.facts["skipped"]["count"] == 0
        told = [record.message for record in caplog.records if "without area" in record.message]
        assert len(told) == 1 and "8 boxes without area are dropped, first" in told[0]
    else:
        assert "4 parts of labels are left out in this pass over the stream" in caplog.text


@pytest.mark.parametrize("check", ["none", 1])
def test_boxes_without_area_are_counted_however_few_images_are_checked(tmp_path: Path, check: Any) -> None:
    bad = {"bbox": [EMPTY[0], [2, 3, 10, 8]], "category": [0, 1]}
    data = load_detection(DataConfig(path=str(boxes_folder(tmp_path / "set", [bad] * 4)), check=check))
    assert data.facts["dropped_boxes"]["count"] == 8


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("objects", [{"bbox": [], "category": []}, None, {"bbox": [EMPTY[0]], "category": [0]}])
def test_a_split_without_a_box_is_refused(tmp_path: Path, split: str, streaming: bool, objects: Any) -> None:
    root = boxes_folder(tmp_path / "set")
    lines = [json.dumps({"file_name": f"{index}.png", "objects": objects}) for index in range(4)]
    (root / split / "metadata.jsonl").write_text("\n".join(lines))
    (said,) = problems_of(load_detection, DataConfig(path=str(root), streaming=streaming))
    assert "expected at least 1 box in" in said and split in said
    load_detection(DataConfig(path=str(root)), need_labels=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_without_a_box_is_refused(tmp_path: Path, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets")
    root = boxes_folder(tmp_path / "set")
    images = [str(root / "train" / f"{n}.png") for n in range(4)]
    good, none = {"bbox": [[1, 1, 5, 5]], "category": [0]}, {"bbox": [], "category": []}
    features = {
        "image": datasets.Image(),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("int64"))),
            "category": datasets.List(datasets.Value("int64")),
        },
    }
    splits = {"train": [none, none, good, good], "validation": [none] * 4}
    tables = {
        split: datasets.Dataset.from_dict({"image": images, "objects": rows}, features=datasets.Features(features))
        for split, rows in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    config = DataConfig(path=str(tmp_path / "saved"), labels=str(root / "labels.json"), streaming=streaming)
    assert "expected at least 1 box in" in (told := problems_of(load_detection, config)[0]) and "validation" in told
    config.eval_split = "train"
    load_detection(config)
    if not streaming:
        config.max_train_samples = 2
        assert problems_of(load_detection, config)[0].startswith(
            "data.train_split: expected at least 1 box in 'train'"
        )


def test_images_without_objects_count_as_empty(tmp_path: Path) -> None:
    good = {"bbox": [[2, 3, 10, 8]], "category": [0]}
    data = load_detection(DataConfig(path=str(boxes_folder(tmp_path / "set", [good, None, "absent", good]))))
    assert len(data.train) == 4 and data.train[2]["labels"]["boxes"].shape == (0, 4)
    assert any("2 of 4 images of train have no objects, first train/1.png" in said for said in data.facts["warnings"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("check", ["all", "none"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_null_mask_is_an_image_without_a_mask(
    make_folder: Make, value: Any, check: Any, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder()
    lines = [{"file_name": f"images/{n}.png", "mask_file_name": f"masks/{n}.png"} for n in range(4)]
    lines[1]["mask_file_name"] = value
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = DataConfig(path=str(root), crop_size=[16, 16], check=check, streaming=streaming)
    data = load_segmentation(config)
    items = list(data.train) if streaming else [data.train[index] for index in range(len(data.train))]
    assert len(items) == 3 and all("labels" in item for item in items)
    assert "1 images without a mask are" in caplog.text
    if not streaming:
        assert data.facts["skipped"] == {
            "count": 1,
            "files": {"train/images/1.png": "train/images/1.png: the metadata give it no mask"},
        }
    assert len(load_images(DataConfig(path=str(root))).train) == 4


def test_a_table_with_null_masks(make_folder: Make, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root = make_folder()
    columns = {
        "image": [str(root / f"train/images/{n}.png") for n in range(4)],
        "mask": [None if n == 1 else str(root / f"train/masks/{n}.png") for n in range(4)],
    }
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "saved")
    labels = str(root / "labels.json")
    config = DataConfig(path=str(tmp_path / "saved"), labels=labels)
    data = load_segmentation(config)
    assert len(data.train) == 3 and data.facts["skipped"]["count"] == 2
    config.streaming = True
    assert len(list(load_segmentation(config).eval)) == 3


def test_a_split_of_null_masks_is_refused(make_folder: Make) -> None:
    root = make_folder()
    line = json.dumps({"file_name": "images/0.png", "mask_file_name": None})
    (root / "train" / "metadata.jsonl").write_text(line)
    said = problems_of(load_segmentation, DataConfig(path=str(root)))
    assert "no image of the train split can be used" in said[0] and "give it no mask" in said[1]


def test_ids_with_gaps_work_in_metadata(tmp_path: Path) -> None:
    objects = [{"bbox": [[2, 3, 10, 8], [3, 3, 5, 5]], "category": [90, "cat"]}] * 4
    names = {"id2label": {"90": "dog", "1": "cat", "3": "emu"}, "palette": {"90": [1, 2, 3]}}
    data = load_detection(DataConfig(path=str(boxes_folder(tmp_path / "set", objects, names))))
    assert data.id2label == {0: "cat", 1: "emu", 2: "dog"}
    assert data.category_ids == data.facts["category_ids"] == [1, 3, 90]
    assert data.eval[0]["labels"]["class_labels"].tolist() == [2, 0]


def test_an_unknown_id_names_those_of_the_set(tmp_path: Path) -> None:
    objects = [{"bbox": [[2, 3, 10, 8]], "category": [2]}] * 4
    root = boxes_folder(tmp_path / "set", objects, {"id2label": {"90": "dog", "1": "cat", "3": "emu"}})
    said = problems_of(load_detection, DataConfig(path=str(root)))
    assert "train/0.png box 0: expected a category out of 1, 'cat', 3, 'emu', 90, 'dog', got 2" in said[0]


# Settings that contradict each other

NAMED = {"id2label": NAMES}


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        (NAMED, {"ignore_index": 0}, ("data.ignore_index", "labels.json names the classes 0..2")),
        (NAMED, {"ignore_index": 2}, ("data.ignore_index", "labels.json names the classes 0..2")),
        (NAMED | {"ignore_index": 1}, {}, ("ignore_index in", "labels.json names the classes 0..2")),
        (NAMED | {"ignore_index": 255}, {"ignore_index": 254}, ("data.ignore_index: expected 255", "labels.json")),
        (NAMED, {"num_labels": 4}, ("data.num_labels: expected 3", "labels.json")),
        (NAMED | {"num_labels": 4}, {}, ("num_labels: expected 3", "labels.json")),
        (NAMED | {"label2id": {"ground": 1}}, {}, ("label2id", "labels.json")),
        (NAMED | {"reduce_labels": False}, {"reduce_labels": True}, ("data.reduce_labels", "labels.json")),
        ({"id2label": NAMES | {"3": "cat"}}, {}, ("id2label.1 and id2label.3", "'cat'")),
        (NAMED | {"palette": {"7": [1, 2, 3]}}, {}, ("palette.7", "labels.json names the classes 0..2")),
        (NAMED | {"palette": {"1": [1, 2, 999]}}, {}, ("palette.1", "triples")),
        ({str(n): f"c{n}" for n in range(300)}, {}, ("the default of data.ignore_index", "classes 0..299")),
        (NAMED | {"reduce_labels": "no"}, {}, ("reduce_labels", "'no'")),
        (NAMED | {"ignore_index": "255"}, {}, ("ignore_index", "'255'")),
        (NAMED | {"ignor_index": 255}, {}, ("'ignor_index'", "did you mean 'ignore_index'?")),
        ({"id2label": {"0": "a", "00": "b"}}, {}, ("each id once", "labels.json")),
        ({"id2label": {"0": "a", "1": "b" * 999}}, {}, ("id2label.1", "1 to 256 characters")),
        ({"id2label": {"0": "void", "1": "cat"}}, {"reduce_labels": True}, ("id2label.0", "data.reduce_labels")),
        ({"id2label": {"0": "a", "1": None}}, {}, ("id2label.1", "None")),
        ({"id2label": {"0": "a", "1": "\ud800"}}, {}, ("id2label.1", "text")),
    ],
)
def test_settings_that_contradict_each_other(
    make_folder: Make, labels: Any, settings: dict[str, Any], expected: tuple[str, ...]
) -> None:
    root = make_folder(labels=labels)
    said = problems_of(load_segmentation, DataConfig(path=str(root), **settings))
    assert all(part in said[0] for part in expected), said


def test_a_number_of_classes_and_a_void_inside_it(make_folder: Make) -> None:
    root = make_folder()
    (root / "labels.json").unlink()
    said = problems_of(load_segmentation, DataConfig(path=str(root), num_labels=3, ignore_index=1))
    assert "data.ignore_index" in said[0] and "data.num_labels names the classes 0..2" in said[0]


def test_void_may_be_named_beside_the_classes(make_folder: Make) -> None:
    for name, void in (("255", {}), ("3", {"ignore_index": 3})):
        root = make_folder(labels={"id2label": NAMES | {name: "void"}, **void})
        assert load_segmentation(DataConfig(path=str(root))).id2label == {0: "ground", 1: "cat", 2: "dog"}
        for path in sorted(root.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_masks_in_colours_need_colours_of_their_own(make_folder: Make) -> None:
    colours = {"0": [9, 9, 9], "1": [9, 9, 9], "2": [8, 8, 8]}
    root = make_folder(labels=NAMED | {"palette": colours})
    load_segmentation(DataConfig(path=str(root)))  # indices: no colour is read
    Image.fromarray(np.full((18, 24, 3), 9, np.uint8)).save(root / "train" / "masks" / "0.png")
    said = problems_of(load_segmentation, DataConfig(path=str(root)))
    assert "palette.0 and palette.1" in said[0] and "train/masks/0.png" in said[0]


@pytest.mark.parametrize(("setting", "value"), [("ignore_index", 0), ("reduce_labels", True)])
def test_boxes_have_no_void(tmp_path: Path, setting: str, value: Any) -> None:
    said = problems_of(load_detection, DataConfig(path=str(boxes_folder(tmp_path / "set")), **{setting: value}))
    assert f"data.{setting}: expected none, as boxes have no label of void" in said[0]
