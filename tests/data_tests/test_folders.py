"""Local folders, labels files, and what is wrong with them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.folders import slice_of
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

Make = Callable[..., Path]


def problems_of(config: DataConfig, load: Any = load_segmentation) -> str:
    with pytest.raises(InputError) as caught:
        load(config)
    return "\n".join(caught.value.problems)


def write_lines(root: Path, *lines: dict[str, Any] | str) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "train" / "metadata.jsonl").write_text(text)


def test_a_folder_gives_its_splits_and_names(make_folder: Make) -> None:
    data = load_segmentation(DataConfig(path=str(make_folder())))
    assert (len(data.train), len(data.eval), data.test) == (4, 2, None)
    assert data.id2label == {0: "ground", 1: "cat", 2: "dog"} and data.ignore_index == 255
    assert data.train.raw(0).name == "train/images/0.png"
    assert data.facts["checked"] == 6 and data.facts["skipped"] == {"count": 0, "files": {}}


def test_a_folder_of_another_name_with_metadata_is_a_split_too(make_folder: Make) -> None:
    root = make_folder()
    shutil.copytree(root / "train", root / "clip_a")
    (root / "notes").mkdir()
    data = load_segmentation(DataConfig(path=str(root), eval_split="clip_a[1:]", test_split="val"))
    assert (len(data.train), len(data.eval), len(data.test)) == (4, 3, 2)
    with pytest.raises(InputError, match=r"expected a split of .* \(train, validation, clip_a\), got 'notes'"):
        load_segmentation(DataConfig(path=str(root), eval_split="notes"))


@pytest.mark.parametrize("path", ["/etc/passwd", "../../x.png", "images/../../x.png", "C:\\x.png", "..\\x.png"])
@pytest.mark.parametrize("key", ["file_name", "mask_file_name"])
def test_no_path_leaves_the_folder(make_folder: Make, path: str, key: str) -> None:
    root = make_folder()
    write_lines(root, {"file_name": "images/0.png", "mask_file_name": "masks/0.png", key: path})
    said = problems_of(DataConfig(path=str(root), on_error="skip"))
    assert "train/metadata.jsonl line 1" in said and key in said and "inside the data folder" in said


def test_every_bad_line_is_told(make_folder: Make) -> None:
    root = make_folder()
    write_lines(
        root, {"file_name": "images/0.png", "mask_file_name": 3}, {"mask_file_name": "masks/0.png"}, {"file_name": ""}
    )
    said = problems_of(DataConfig(path=str(root)))
    assert all(f"line {number}" in said for number in (1, 2, 3))


@pytest.mark.parametrize(("line", "expected"), [("{broken", "line 1: not valid json"), ("[1]", "expected an object")])
def test_broken_metadata(make_folder: Make, line: str, expected: str) -> None:
    root = make_folder()
    write_lines(root, line)
    assert expected in problems_of(DataConfig(path=str(root)))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_all_broken_lines_are_told_with_what_is_wrong_in_others(make_folder: Make, ending: str) -> None:
    root = make_folder()
    (root / "train" / "metadata.jsonl").unlink()
    if ending == "csv":
        lines = ["file_name,mask_file_name", "images/0.png,masks/0.png,1", "../x.png,masks/1.png", "a,b,c"]
    else:
        lines = ["{broken", '{"file_name": "../x.png", "mask_file_name": "masks/1.png"}', "[1]", "nonsense"]
    (root / "train" / f"metadata.{ending}").write_text("\n".join(lines))
    wrong = problems_of(DataConfig(path=str(root))).splitlines()
    numbers = (2, 4, 3) if ending == "csv" else (1, 3, 4, 2)
    assert [line.partition(" line ")[2].partition(":")[0] for line in wrong] == list(map(str, numbers)), wrong
    (root / "train" / f"metadata.{ending}").write_text("\n".join([*lines[:1], *lines[-1:] * 30]))
    assert len(problems_of(DataConfig(path=str(root))).splitlines()) == 21  # and their number


def test_a_missing_split_lists_those_there_are(make_folder: Make) -> None:
    root = make_folder()
    said = problems_of(DataConfig(path=str(root), eval_split="holdout", test_split="tset"))
    assert "data.eval_split: expected a split of" in said and "(train, validation), got 'holdout'" in said
    assert "data.test_split" in said


def test_a_missing_folder(tmp_path: Path) -> None:
    said = problems_of(DataConfig(path=str(tmp_path / "nowhere")))
    assert "data.path: expected a folder, a parquet file or a Hub data set" in said and "nowhere" in said


def test_masks_need_metadata_and_names(make_folder: Make) -> None:
    root = make_folder()
    (root / "labels.json").unlink()
    assert "data.labels: expected the class names" in problems_of(DataConfig(path=str(root)))
    data = load_segmentation(DataConfig(path=str(root), num_labels=3))
    assert data.id2label == {0: "class_0", 1: "class_1", 2: "class_2"}
    (root / "train" / "metadata.jsonl").unlink()
    assert "expected metadata.jsonl" in problems_of(DataConfig(path=str(root), num_labels=3))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"id2label": {"0": "a", "2": "b"}}', "expected the ids 0..K-1 without a gap"),
        ('{"id2label": {"sky": "0"}}', "keys that are no numbers"),
        ('{"id2label": ', "not valid json"),
        ('"sky"', "expected an object"),
        ('{"id2label": {"0": "a"}, "palette": {"0": [1, 2]}}', "triples"),
    ],
)
def test_bad_labels_file(make_folder: Make, content: str, expected: str) -> None:
    root = make_folder()
    (root / "labels.json").write_text(content)
    assert expected in problems_of(DataConfig(path=str(root)))


@pytest.mark.parametrize(
    "content", [{"0": "ground", "1": "cat", "2": "dog"}, ["ground", "cat", "dog"], {"id2label": ["x"]}]
)
def test_labels_files_of_other_shapes(make_folder: Make, tmp_path: Path, content: Any) -> None:
    file = tmp_path / "names.json"
    file.write_text(json.dumps(content))
    config = DataConfig(path=str(make_folder()), labels=str(file))
    if content == {"id2label": ["x"]}:
        assert "data.labels" in problems_of(config)
    else:
        assert load_segmentation(config).id2label == {0: "ground", 1: "cat", 2: "dog"}


def test_reduced_labels_do_not_wrap_around(make_folder: Make) -> None:
    labels = {"id2label": {"0": "cat", "1": "dog"}, "reduce_labels": True}
    data = load_segmentation(DataConfig(path=str(make_folder(labels=labels))))
    raw = np.array(Image.open(Path(data.facts["source"]) / "train/masks/0.png"))
    mask = data.train.raw(0).label.numpy()
    assert (mask[raw == 0] == 255).all() and (mask[raw == 1] == 0).all() and (mask[raw == 2] == 1).all()


def test_a_negative_ignore_index(make_folder: Make) -> None:
    config = DataConfig(path=str(make_folder()), ignore_index=-100, crop_size=[64, 64], scale=[1, 1])
    labels = load_segmentation(config).train[0]["labels"]
    assert labels.dtype == torch.int64 and (labels == -100).any() and labels.max() == 2


def test_more_than_256_classes(make_folder: Make) -> None:
    root = make_folder(labels={str(index): f"c{index}" for index in range(400)})
    values = np.full((18, 24), 399, dtype=np.uint16)
    Image.fromarray(values).save(root / "train" / "masks" / "0.png")
    data = load_segmentation(DataConfig(path=str(root), crop_size=[16, 16], ignore_index=65535))
    assert data.train.raw(0).label.max() == 399 and 399 in data.train[0]["labels"]


def test_labels_out_of_range_stop_even_when_skipping(make_folder: Make) -> None:
    root = make_folder()
    Image.fromarray(np.full((18, 24), 9, dtype=np.uint8)).save(root / "train" / "masks" / "1.png")
    said = problems_of(DataConfig(path=str(root), on_error="skip"))
    assert "train/masks/1.png: expected labels 0..2 or 255 (void), got [9] in 432 pixels" in said


def test_a_split_of_which_nothing_is_left(make_folder: Make) -> None:
    root = make_folder(train=3, val=1)
    (root / "val" / "images" / "0.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    said = problems_of(DataConfig(path=str(root), on_error="skip"))
    assert "no image of the eval split can be used" in said and "git lfs pull" in said


def test_many_problems_are_counted(make_folder: Make) -> None:
    root = make_folder(train=30)
    for index in range(28):
        (root / "train" / "images" / f"{index}.png").write_bytes(b"")
    said = problems_of(DataConfig(path=str(root)))
    assert "train/images/0.png: expected an image that decodes, got an empty file" in said
    assert "... and 8 more of 28" in said and "data.on_error=skip" in said


def test_a_capped_check_looks_all_over_the_split(make_folder: Make) -> None:
    root = make_folder(train=9)
    (root / "train" / "images" / "8.png").write_bytes(b"no image")
    assert "8.png" in problems_of(DataConfig(path=str(root), check=3))
    assert load_segmentation(DataConfig(path=str(root), check="none")).facts["checked"] == 0


def test_what_is_odd_is_warned_of(make_folder: Make, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder()
    (root / "val" / "images" / "0.png").write_bytes((root / "train" / "images" / "2.png").read_bytes())
    with caplog.at_level(logging.WARNING):
        warnings = load_segmentation(DataConfig(path=str(root))).facts["warnings"]
    assert any("pictures of the eval split are also in the train split" in warning for warning in warnings)
    assert "are also in" in caplog.text


def test_images_alone_leave_mask_folders_out(make_folder: Make) -> None:
    root = make_folder()
    for split in ("train", "val"):
        (root / split / "metadata.jsonl").unlink()
    data = load_images(DataConfig(path=str(root)))
    assert (len(data.train), len(data.eval)) == (4, 2)
    flat = load_images(DataConfig(path=str(root / "train" / "images"), holdout=0.3))
    assert (len(flat.train), len(flat.eval)) == (2, 2)


def test_csv_metadata_and_a_root_file(make_folder: Make) -> None:
    root = make_folder()
    text = "file_name,mask_file_name\ntrain/images/0.png,train/masks/0.png\nval/images/0.png,val/masks/0.png\n"
    for split in ("train", "val"):
        (root / split / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_text(text)
    data = load_segmentation(DataConfig(path=str(root)))
    assert (len(data.train), len(data.eval)) == (1, 1) and data.eval.raw(0).name == "val/images/0.png"


def test_slices_and_limits(make_folder: Make) -> None:
    config = DataConfig(path=str(make_folder()), train_split="train[:75%]", eval_split="train[75%:]")
    data = load_segmentation(config)
    assert data.train.indices == [0, 1, 2] and data.eval.indices == [3]
    config.max_train_samples = 2
    assert len(load_segmentation(config).train) == 2
    assert slice_of("train[10:20]", 15) == ("train", range(10, 15))
    assert slice_of("train[1::4]", 10) == ("train", range(1, 10, 4))
    assert slice_of("train[::4][:2]", 20) == ("train", range(0, 8, 4))
    assert slice_of("train[:2]+train[8:]", 10) == ("train", [0, 1, 8, 9])
    assert slice_of("train[::4] - train[:3] - train[8:]", 12) == ("train", [4])
    assert slice_of("train-2[:2]", 10) == ("train-2", range(2)) and slice_of("a+b", 1) == ("a+b", range(1))
    parts = [slice_of(f"train[::2][{part}@3]", 20)[1] for part in ("30%:", ":30%")]
    assert len(parts[1]) == 3 and sorted([*parts[0], *parts[1]]) == list(range(0, 20, 2))
    for wrong in ("train[abc]", "train[::8", "train[::]x", "[:3]"):
        with pytest.raises(InputError, match="expected a split like"):
            slice_of(wrong, 5)
    with pytest.raises(InputError, match="a step of at least 1"):
        slice_of("train[::0]", 5)
