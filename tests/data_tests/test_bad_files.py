"""What a data folder of a stranger may hold: each ends in one line that names the place, and never hangs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.files import outside, shown
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

from .bad_folders import COCO, boxes_folder, coco_folder, problems_of
from .conftest import NAMES

Make = Callable[..., Path]
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000


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


@pytest.mark.parametrize("kind", ["fifo", "device", "link"])
def test_a_saved_table_of_no_files(tmp_path: Path, kind: str) -> None:
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    special(tmp_path / "saved" / "train" / "data-00000-of-00001.arrow", kind)
    said = problems_of(load_images, DataConfig(path=str(tmp_path / "saved")))
    assert "data-00000-of-00001.arrow" in said[0]


def test_a_key_of_the_labels_file_that_is_there_twice(make_folder: Make) -> None:
    root = make_folder()
    (root / "labels.json").write_text('{"0": "a", "1": "b", "1": "c", "2": "d"}')
    assert "the key '1' is in it twice" in problems_of(load_segmentation, DataConfig(path=str(root)))[0]


@pytest.mark.parametrize("split", ["train[" + "9" * 5000 + ":]", "train[:-1]", "[:3]", "train[1:2:3:4]"])
def test_splits_that_are_none(make_folder: Make, split: str) -> None:
    (said,) = problems_of(load_segmentation, DataConfig(path=str(make_folder()), train_split=split))
    assert "expected a split like" in said


def test_links_out_of_the_folder_through_a_folder(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    (root / "train" / "masks").rename(tmp_path / "elsewhere")
    (root / "train" / "masks").symlink_to(tmp_path / "elsewhere")
    said = problems_of(load_segmentation, DataConfig(path=str(root)))
    assert len(said) == 1 and said[0].startswith("train/masks: expected a file or folder inside the data folder")
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
