"""What a data folder of a stranger may hold: each ends in one line that names the place, and never hangs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.files import outside, shown
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

from .conftest import NAMES, picture

Make = Callable[..., Path]
COCO = "annotations/instances_{split}.json"
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


def problems_of(load: Any, config: DataConfig) -> list[str]:
    """All problems of loading and of reading every sample; each is one line of bounded length."""
    with pytest.raises(InputError) as caught:
        data = load(config)
        for split in (data.train, data.eval):
            list(split if config.streaming else (split[index] for index in range(len(split))))
    problems = list(caught.value.problems)
    assert all("\n" not in problem and len(problem) < 700 for problem in problems), problems
    return problems


def boxes_folder(root: Path, objects: list[Any] | None = None, names: Any = None, **changes: Any) -> Path:
    """Four images of 40 x 30 a split with `objects` in metadata.jsonl, and labels.json."""
    given = objects or [{"bbox": [[2, 3, 10, 8]], "category": [0]}] * 4
    for seed, split in enumerate(("train", "val")):
        (root / split).mkdir(parents=True)
        lines = []
        for index, value in enumerate(given):
            picture(10 * seed + index, (40, 30)).save(root / split / f"{index}.png")
            line = {"file_name": f"{index}.png", "objects": value, **changes}
            lines.append({key: item for key, item in line.items() if item != "absent"})
        (root / split / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (root / "labels.json").write_text(json.dumps(names or {"id2label": NAMES}))
    return root


def coco_folder(root: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> Path:
    """The same with COCO json, whose training file `change` edits."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        picture(0, (40, 30)).save(root / split / "0.png")
        content = {
            "images": [{"id": 1, "file_name": "0.png"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 5, 6]}],
            "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
        }
        if split == "train":
            change(content)
        (root / "annotations").mkdir(exist_ok=True)
        (root / COCO.format(split=split)).write_text(json.dumps(content))
    return root


# Boxes without area, splits without boxes, images without a mask, ids with gaps


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


# Files that are no files, links, and JSON that is meant to harm


def special(path: Path, kind: str) -> None:
    """Puts something at a path that is no regular file inside the folder."""
    if path.is_file():
        path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # an address has at most 108 bytes
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path, "device": "/dev/zero", "link": "/etc/hostname", "dangling": "nowhere"}[kind])


KINDS = ["fifo", "socket", "folder", "loop", "device", "link", "dangling"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["train/images/1.png", "train/masks/1.png", "train/metadata.jsonl", "labels.json"])
def test_what_is_no_file_is_named(make_folder: Make, place: str, kind: str) -> None:
    root = make_folder()
    special(root / place, kind)
    said = problems_of(load_segmentation, DataConfig(path=str(root)))
    assert place in said[0] and len(said) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_coco_file_is_named(tmp_path: Path, kind: str) -> None:
    root = coco_folder(tmp_path / "set")
    special(root / COCO.format(split="train"), kind)
    said = problems_of(load_detection, DataConfig(path=str(root)))
    assert COCO.format(split="train") in said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_metadata_may_be_no_files(make_folder: Make, kind: str) -> None:
    root = make_folder()
    for split in ("train", "val"):
        (root / split / "metadata.jsonl").unlink()
    special(root / "train" / "images" / "1.png", kind)
    assert "train/images/1.png" in problems_of(load_images, DataConfig(path=str(root)))[0]


@pytest.mark.parametrize("kind", ["fifo", "device", "link", "loop"])
def test_a_data_path_that_is_no_folder(tmp_path: Path, kind: str) -> None:
    special(tmp_path / "set", kind)
    assert "data.path" in problems_of(load_segmentation, DataConfig(path=str(tmp_path / "set")))[0]
    special(tmp_path / "set.parquet", kind)
    assert "set.parquet" in problems_of(load_segmentation, DataConfig(path=str(tmp_path / "set.parquet")))[0]


def test_links_out_of_the_folder_through_a_folder(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    (root / "train" / "masks").rename(tmp_path / "elsewhere")
    (root / "train" / "masks").symlink_to(tmp_path / "elsewhere")
    said = problems_of(load_segmentation, DataConfig(path=str(root)))
    assert len(said) == 4 and "train/masks/0.png: expected a file inside the data folder" in said[0]
    (root / "inner.png").symlink_to(root / "train" / "images" / "0.png")
    assert outside(root, [root / "inner.png"]) == []
    (tmp_path / "link").symlink_to(root)
    assert outside(tmp_path / "link", [tmp_path / "link" / "labels.json"]) == []


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0.png", "\ud800.png", "/etc/hostname", "../x.png", 7, [], {}])
@pytest.mark.parametrize("key", ["file_name", "mask_file_name"])
def test_file_names_that_no_disk_holds(make_folder: Make, key: str, name: Any) -> None:
    root = make_folder()
    line = {"file_name": "images/0.png", "mask_file_name": "masks/0.png", key: name}
    (root / "train" / "metadata.jsonl").write_text(json.dumps(line))
    (said,) = problems_of(load_segmentation, DataConfig(path=str(root)))
    assert "train/metadata.jsonl line 1" in said and key in said


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/dev/zero", "/" + "y" * 300])
def test_data_paths_that_no_disk_holds(path: str) -> None:
    for load in (load_segmentation, load_detection, load_images):
        assert "data.path" in problems_of(load, DataConfig(path=path))[0]


BROKEN = [DEEP, LONG, '{"a": ' + DEEP + "}", '{"a": ' + LONG + "}", "\x00" * 5000, "{", "nan", "[1", '"\udc80"']


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_json_that_python_cannot_hold(tmp_path: Path, make_folder: Make, text: str) -> None:
    root, coco = make_folder(), coco_folder(tmp_path / "coco")
    data = text.encode("utf-8", "surrogateescape")
    for file in ("train/metadata.jsonl", "labels.json"):
        before = (root / file).read_bytes()
        (root / file).write_bytes(data)
        (said,) = problems_of(load_segmentation, DataConfig(path=str(root)))
        assert file in said
        (root / file).write_bytes(before)
    (coco / COCO.format(split="train")).write_bytes(data)
    (said,) = problems_of(load_detection, DataConfig(path=str(coco)))
    assert COCO.format(split="train") in said


def test_files_of_gigabytes(make_folder: Make, tmp_path: Path) -> None:
    root, coco = make_folder(), coco_folder(tmp_path / "coco")
    for file in (root / "labels.json", coco / COCO.format(split="train")):
        before = file.read_bytes()
        os.truncate(file, 20 * 2**30)  # a hole: no disk is used
        load, where = (load_segmentation, root) if file.parent == root else (load_detection, coco)
        assert "at most" in problems_of(load, DataConfig(path=str(where)))[0]
        file.write_bytes(before)
    os.truncate(root / "train" / "metadata.jsonl", 20 * 2**30)
    said = problems_of(load_segmentation, DataConfig(path=str(root)))
    assert "metadata.jsonl line 4: expected at most" in said[0]


def test_a_byte_order_mark_is_no_fault(make_folder: Make, tmp_path: Path) -> None:
    root, coco = make_folder(), coco_folder(tmp_path / "coco")
    for file in (root / "labels.json", root / "train/metadata.jsonl", coco / COCO.format(split="train")):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(load_segmentation(DataConfig(path=str(root))).train) == 4
    assert load_detection(DataConfig(path=str(coco))).category_ids == [3, 90]


WRONG: list[Any] = [
    None,
    True,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    10**400,
    "x",
    "",
    [],
    {},
    [[]],
    ["x"],
    {"a": 1},
]


@pytest.mark.parametrize("value", WRONG, ids=shown)
def test_wrong_values_anywhere_in_metadata(tmp_path: Path, value: Any) -> None:
    """Whatever stands in the place of a value: it loads, or it is an InputError of short lines."""
    good = {"bbox": [[2, 3, 10, 8]], "category": [0], "area": [4], "iscrowd": [0]}
    changed: list[Any] = [{"objects": good | {key: one}} for key in good for one in (value, [value])]
    changed += [{"objects": good | {"bbox": [[value, 3, 10, 8]]}}, {"objects": good | {"bbox": [[2, 3, value, 8]]}}]
    changed += [{"objects": value}, {"objects": [value]}, {"objects": [good | {"bbox": value}]}]
    changed += [{key: value} for key in ("width", "height", "image_id", "file_name", "other")]
    root = boxes_folder(tmp_path / "set")
    line = {"file_name": "0.png", "width": 40, "height": 30, "image_id": 3, "objects": good}
    for change in changed:
        (root / "train" / "metadata.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | change))
        for on_error in ("stop", "skip"):
            load_or_refuse(DataConfig(path=str(root), on_error=on_error))


@pytest.mark.parametrize("value", WRONG, ids=shown)
def test_wrong_values_anywhere_in_coco_json(tmp_path: Path, value: Any) -> None:
    root = coco_folder(tmp_path / "set")
    file = root / COCO.format(split="train")
    before = file.read_text()
    places = [("images", "id"), ("images", "file_name"), ("images", "width"), ("annotations", "id")]
    places += [("annotations", key) for key in ("image_id", "category_id", "bbox", "area", "iscrowd")]
    places += [("categories", "id"), ("categories", "name"), *((key, "") for key in json.loads(before))]
    for part, key in places:
        content = json.loads(before)
        if key:
            content[part][0][key] = value
        else:
            content[part] = value
        file.write_text(json.dumps(content))
        load_or_refuse(DataConfig(path=str(root)))


@pytest.mark.parametrize("value", WRONG, ids=shown)
def test_wrong_values_anywhere_in_the_labels_file(make_folder: Make, value: Any) -> None:
    root = make_folder()
    contents = [value, {"id2label": value}, {"id2label": {"0": value}}, [value], {"0": value}]
    contents += [{"id2label": NAMES, key: value} for key in ("palette", "ignore_index", "reduce_labels", "num_labels")]
    contents += [{"id2label": NAMES, "palette": {"0": one}} for one in (value, [value] * 3)]
    for content in contents:
        (root / "labels.json").write_text(json.dumps(content))
        load_or_refuse(DataConfig(path=str(root)), load_segmentation)


def load_or_refuse(config: DataConfig, load: Any = load_detection) -> None:
    try:
        data = load(config)
        data.collate([data.train[index] for index in range(len(data.train))])
    except InputError as error:
        assert all("\n" not in problem and len(problem) < 700 for problem in error.problems), error.problems
