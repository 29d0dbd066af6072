"""Where unlabelled images of a detection set come from, and how the student's pictures are augmented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.data.common.strong import Strong
from cankd_hf.data.detection.load import load_detection
from cankd_hf.errors import InputError
from tests.training.detection_folders import write_boxes, write_coco


def load(folder: Path, **settings: Any) -> Any:
    return load_detection(DataConfig(path=str(folder), image_size=[64, 96], **settings))


def unsaid(folder: Path, *rows: int) -> None:
    """Takes away what is said of some training images."""
    file = folder / "train" / "metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{"file_name": line["file_name"]} if row in rows else line for row, line in enumerate(lines)]
    file.write_text("\n".join(map(json.dumps, kept)))


def test_rows_without_boxes_become_the_unlabelled_half(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_boxes(tmp_path / "boxes", 6, 1)
    unsaid(folder, 1, 4)
    made = load(folder, unlabelled="rows")
    assert [made.unlabelled.name(row) for row in range(2)] == ["1.png", "4.png"] or len(made.unlabelled) == 2
    assert len(made.train) == 4 and "no objects" not in caplog.text
    item = made.unlabelled[0]
    assert "labels" not in item and {"teacher_pixel_values", "drawn"} <= item.keys()
    assert "labels" in made.train[0] and "teacher_pixel_values" not in made.train[0]
    # an image that is said to show nothing is labelled
    lines = (folder / "train" / "metadata.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"file_name": json.loads(lines[2])["file_name"], "objects": {"bbox": [], "category": []}})
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    assert len(load(folder, unlabelled="rows").train) == 4


def test_rows_of_a_table_and_of_coco(tmp_path: Path) -> None:
    objects = [{"bbox": [[4.0, 4, 20, 20]], "category": [0]}, None, {"bbox": [], "category": []}, None]
    folder = write_boxes(tmp_path / "boxes", 4, 1)
    images = [str(folder / "train" / f"{row}.png") for row in range(4)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"))),
                "category": datasets.List(datasets.Value("int64")),
            },
        }
    )
    table = datasets.Dataset.from_dict({"image": images, "objects": objects}, features=features)
    datasets.DatasetDict({"train": table, "validation": table.select([0])}).save_to_disk(str(tmp_path / "saved"))
    made = load(tmp_path / "saved", unlabelled="rows", num_labels=1, check="none")
    assert len(made.train) == 2 and len(made.unlabelled) == 2 and "labels" not in made.unlabelled[1]
    coco = write_coco(tmp_path / "coco", {"train": "train", "val": "val"})
    file = coco / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] not in (0, 5)]
    file.write_text(json.dumps(content))
    made = load(coco, unlabelled="rows")
    assert len(made.train) == 6 and len(made.unlabelled) == 2


def test_two_parts_of_a_coco_split_do_not_overlap(tmp_path: Path) -> None:
    """The order of the file is not that of the names."""
    coco = write_coco(tmp_path / "coco", {"train": "train", "val": "val"})
    file = coco / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["images"].reverse()
    file.write_text(json.dumps(content))
    made = load(coco, train_split="train[:25%]", unlabelled=str(coco), unlabelled_split="train[25%:]")
    seen = [{part.name(row) for row in range(len(part))} for part in (made.train, made.unlabelled)]
    assert len(seen[0]) == 2 and len(seen[1]) == 6 and not seen[0] & {Path(name).name for name in seen[1]} - seen[0]
    assert not seen[0] & seen[1]


def test_strong_augmentation_of_boxes_is_that_of_ubtv2_unless_said_otherwise(tmp_path: Path) -> None:
    folder = write_boxes(tmp_path / "boxes", 4, 1)
    strong = load(folder, unlabelled=str(folder), unlabelled_split="train").unlabelled.transform.strong
    assert isinstance(strong, Strong)
    assert strong.jitter == [0.4, 0.4, 0.4, 0.1] and strong.erase == [0.7, 0.5, 0.3] and strong.config.cutmix == 0
    asked = StrongConfig(cutmix=1.0, erase=[], jitter=[0.0, 0.0, 0.0, 0.0])
    strong = load(folder, unlabelled=str(folder), unlabelled_split="train", strong=asked).unlabelled.transform.strong
    assert strong.config.cutmix == 1 and strong.erase == [] and not any(strong.jitter)
    # colours change, places do not
    item = load(folder, unlabelled=str(folder), unlabelled_split="train").unlabelled[0]
    assert item["pixel_values"].shape == item["teacher_pixel_values"].shape


def test_pictures_alone_may_come_from_anywhere(tmp_path: Path) -> None:
    folder, plain = write_boxes(tmp_path / "boxes", 4, 1), tmp_path / "plain"
    plain.mkdir()
    for number, file in enumerate(sorted((folder / "test").glob("*.png"))):
        file.rename(plain / f"{number}.png")
    made = load(folder, unlabelled=str(plain), eval_split="val")
    assert len(made.unlabelled) == 1 and "labels" not in made.unlabelled[0]
    with pytest.raises(InputError, match=r"data\.unlabelled: expected images without a label"):
        load(folder, unlabelled="rows")
