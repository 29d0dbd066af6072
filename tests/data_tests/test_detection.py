"""Detection sets: folders, COCO json, tables, streams, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.detection.objects import Annotation, fit_to_image
from cankd_hf.errors import InputError

COCO = "annotations/instances_{split}.json"
BOXES = [[[2.0, 3.0, 10.0, 8.0], [20.0, 10.0, 12.5, 9.0]], [], [[0.0, 0.0, 40.0, 30.0]]]
CLASSES = [[0, 2], [], [1]]
Make = Callable[..., Path]


@pytest.fixture
def make_set(tmp_path: Path) -> Make:
    """Writes three images of 40 x 30 a split with metadata.jsonl and COCO json; returns the root."""

    def make(boxes: Any = None, classes: Any = None, **changes: Any) -> Path:
        root = tmp_path / "set"
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        for seed, split in enumerate(("train", "val")):
            (root / split).mkdir(exist_ok=True)
            lines, images, annotations = [], [], []
            for index, (bbox, category) in enumerate(zip(boxes or BOXES, classes or CLASSES, strict=True)):
                noise = np.random.default_rng(10 * seed + index).integers(0, 255, (30, 40, 3)).astype(np.uint8)
                Image.fromarray(noise).save(root / split / f"{index}.png")
                facts = {"file_name": f"{index}.png", "width": 40, "height": 30}
                lines.append(
                    facts | {"image_id": 7 + index, "objects": {"bbox": bbox, "category": category}} | changes
                )
                images.append(facts | {"id": 7 + index})
                for box, label in zip(bbox, category, strict=True):
                    number = len(annotations) + 1
                    entry = {"id": number, "image_id": 7 + index, "category_id": label * 5 + 3, "bbox": box}
                    annotations.append(entry | {"area": 11.0, "iscrowd": 0})
            (root / split / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
            categories = [{"id": 13, "name": "emu"}, {"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (root / COCO.format(split=split)).write_text(json.dumps(content))
        (root / "labels.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog", "2": "emu"}}))
        return root

    return make


def config_of(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**({"path": str(root), "scale": [1.0, 1.0], "flip": 0.0} | changes))


def problems_of(config: DataConfig) -> str:
    with pytest.raises(InputError) as caught:
        load_detection(config)
    return "\n".join(caught.value.problems)


def edit(root: Path, change: Callable[[dict[str, Any]], None]) -> DataConfig:
    """Change the training COCO json; returns a config that reads it."""
    file = root / COCO.format(split="train")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return config_of(root, annotations=COCO)


@pytest.mark.parametrize("annotations", ["auto", COCO])
def test_items_of_a_folder(make_set: Make, annotations: str) -> None:
    data = load_detection(config_of(make_set(), annotations=annotations))
    assert data.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert data.category_ids == data.facts["category_ids"] == ([0, 1, 2] if annotations == "auto" else [3, 8, 13])
    assert data.facts["splits"] == {"train": 3, "eval": 3} and data.facts["warnings"] == []
    for split in (data.train, data.eval):
        item = split[0]
        labels = item["labels"]
        assert item["pixel_values"].shape == (3, 30, 40) and labels["class_labels"].tolist() == [0, 2]
        expected = torch.tensor([[7.0, 7.0, 10.0, 8.0], [26.25, 14.5, 12.5, 9.0]]) / torch.tensor([40, 30, 40, 30])
        torch.testing.assert_close(labels["boxes"], expected)
        assert labels["area"].tolist() == ([80.0, 112.5] if annotations == "auto" else [11.0, 11.0])
        assert labels["image_id"].tolist() == [7] and labels["iscrowd"].tolist() == [0, 0]
        assert labels["size"].tolist() == labels["orig_size"].tolist() == [30, 40]
        empty = split[1]["labels"]
        assert empty["boxes"].shape == (0, 4) and empty["class_labels"].dtype == torch.int64


def test_coco_json_is_found_without_metadata(make_set: Make) -> None:
    root = make_set()
    for split in ("train", "val"):
        (root / split / "metadata.jsonl").unlink()
    assert load_detection(config_of(root)).category_ids == [3, 8, 13]


def test_images_alone(make_set: Make) -> None:
    data = load_detection(config_of(make_set()), need_labels=False)
    assert set(data.train[0]) == {"pixel_values"} and set(data.collate([data.eval[0]])) == {"pixel_values"}


def test_corners_and_names(make_set: Make) -> None:
    names = [["cat", "emu"], [], ["dog"]]
    corners = [[[x, y, x + w, y + h] for x, y, w, h in boxes] for boxes in BOXES]
    one = load_detection(config_of(make_set(corners, CLASSES), box_format="xyxy")).eval[0]["labels"]
    root = make_set()
    for line in (lines := [json.loads(text) for text in (root / "val" / "metadata.jsonl").read_text().splitlines()]):
        line["objects"]["category"] = names[line["image_id"] - 7]
    (root / "val" / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    two = load_detection(config_of(root)).eval[0]["labels"]
    torch.testing.assert_close(one, two)


def test_a_set_of_corners_stops(make_set: Make) -> None:
    corners = [[[10.0, 12.0, 38.0, 29.0]]] * 4
    said = problems_of(config_of(make_set(corners, [[0]] * 4)))
    assert "look like [x0, y0, x1, y1] in 8 of 8 images" in said and "data.box_format=xyxy" in said


@pytest.mark.parametrize(
    ("box", "label", "expected"),
    [
        ([1, 2, -3, 4], 0, "train/0.png box 1 [1, 2, -3, 4]: expected a width and a height above 0, got -3 x 4"),
        ([1, 2, 3, -1], 0, "got 3 x -1"),
        (
            [1, 2, float("nan"), 4],
            0,
            "train/0.png box 1: expected [x, y, width, height] in pixels, got [1, 2, nan, 4]",
        ),
        ([1, 2, 3], 0, "got 3 numbers: [1, 2, 3]"),
        ("1 2 3 4", 0, "expected [x, y, width, height] in pixels, got '1 2 3 4'"),
        ([50, 2, 3, 4], 0, "box 1 [50, 2, 3, 4]: expected a box in the image of 40 x 30, got one outside"),
        ([1, 2, 3, 4], -1, "train/0.png box 1: expected a category out of 0, 'cat', 1, 'dog', 2, 'emu', got -1"),
        ([1, 2, 3, 4], 3, "got 3"),
        ([1, 2, 3, 4], 0.5, "got 0.5"),
        ([1, 2, 3, 4], True, "got True"),
    ],
)
def test_a_bad_box_is_named(make_set: Make, box: Any, label: Any, expected: str) -> None:
    root = make_set([[[2, 3, 4, 5], box], [], [[0, 0, 4, 3]]], [[0, label], [], [1]])
    said = problems_of(config_of(root))
    assert expected in said and "val/0.png" in said  # all at once, or
    if label == 0:
        data = load_detection(config_of(root, on_error="skip"))
        assert data.facts["dropped_boxes"]["count"] == 2 and len(data.train[0]["labels"]["boxes"]) == 1
    else:
        assert expected in problems_of(config_of(root, on_error="skip"))


def test_an_image_without_a_usable_box_is_left_out(make_set: Make) -> None:
    root = make_set([[[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.5, 0.5]], [], [[0, 0, 4, 3]]])
    said = problems_of(config_of(root))
    assert "train/0.png box 0 [0.1, 0.1, 0.4, 0.5]: expected pixels" in said and "shares of the image?" in said
    facts = load_detection(config_of(root, on_error="skip")).facts
    assert list(facts["skipped"]["files"]) == ["train/0.png", "val/0.png"] and facts["splits"]["train"] == 2


def test_boxes_beyond_the_border_are_cut_and_told(make_set: Make) -> None:
    root = make_set([[[30, 20, 11.5, 5], [35, 20, 30, 5]], [], [[0, 0, 4, 3]]])
    data = load_detection(config_of(root))
    objects = data.train.raw(0).label
    assert objects.boxes.tolist() == [[30, 20, 40, 25], [35, 20, 40, 25]] and objects.area.tolist() == [50, 25]
    assert any("train/0.png box 1 [35, 20, 30, 5] reaches 25 pixels beyond" in text for text in data.facts["warnings"])
    assert not any("box 0 [30" in text for text in data.facts["warnings"])


def test_wrong_lists_and_keys_are_named(make_set: Make) -> None:
    said = problems_of(config_of(make_set(objects={"bbox": [[1, 2, 3, 4]], "category": []})))
    assert "train/0.png: expected a category for each box, got 1 boxes and 0 categories" in said
    assert "expected objects with `bbox` and `category`" in problems_of(config_of(make_set(objects={"box": 3})))
    assert "expected metadata.jsonl with the key 'things'" in problems_of(
        config_of(make_set(), objects_column="things")
    )


def test_coco_json_that_is_wrong(make_set: Make) -> None:
    root = make_set()
    said = problems_of(edit(root, lambda content: content["annotations"][0].update(image_id=99)))
    assert "annotations/instances_train.json: 1 annotations belong to no image, first id 1 with image_id 99" in said
    data = load_detection(config_of(root, annotations=COCO, on_error="skip"))
    assert len(data.train[0]["labels"]["boxes"]) == 1 and "belong to no image" in data.facts["warnings"][0]
    said = problems_of(edit(make_set(), lambda content: content["images"][0].update(file_name="../../x.png")))
    assert "instances_train.json images[0]: expected a relative path" in said
    assert "list of categories" in problems_of(edit(make_set(), lambda content: content.pop("categories")))
    said = problems_of(edit(make_set(), lambda content: content["categories"][0].update(name="gnu")))
    assert "expected the categories of the other splits, got others: [(13, 'emu'), (13, 'gnu')]" in said
    said = problems_of(edit(make_set(), lambda content: content["annotations"][1].update(category_id=4)))
    assert "train/0.png box 1: expected a category out of 3, 8, 13, got 4" in said
    assert "expected a path with {split} in it" in problems_of(config_of(root, annotations="x.json"))


def test_repeated_annotation_ids_keep_all_boxes(make_set: Make) -> None:
    config = edit(make_set(), lambda content: [entry.update(id=1) for entry in content["annotations"]])
    data = load_detection(config)
    assert sum(len(data.train[index]["labels"]["boxes"]) for index in range(3)) == 3
    assert "1 annotation ids are repeated, first 1 (3 times)" in data.facts["warnings"][0]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_table_with_class_labels(make_set: Make, as_list: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root = make_set()
    box, label = datasets.List(datasets.Value("float32"), length=4), datasets.ClassLabel(names=["cat", "dog", "emu"])
    if as_list:
        kind = datasets.List({"bbox": box, "category": label})
        objects = [
            [{"bbox": one, "category": two} for one, two in zip(*pair, strict=True)]
            for pair in zip(BOXES, CLASSES, strict=True)
        ]
    else:
        kind = {"bbox": datasets.List(box), "category": datasets.List(label)}
        objects = [{"bbox": one, "category": two} for one, two in zip(BOXES, CLASSES, strict=True)]
    features = datasets.Features({"image": datasets.Image(), "objects": kind})
    rows = {"image": [str(root / "train" / f"{index}.png") for index in range(3)], "objects": objects}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "saved")
    data = load_detection(config_of(tmp_path / "saved"))
    plain = load_detection(config_of(root))
    assert data.id2label == plain.id2label
    for index in range(3):
        one, two = data.train[index], plain.train[index]
        torch.testing.assert_close(one["pixel_values"], two["pixel_values"])
        torch.testing.assert_close(one["labels"]["boxes"], two["labels"]["boxes"])
        assert one["labels"]["class_labels"].tolist() == CLASSES[index]
    assert "data.objects_column: expected a column" in problems_of(
        config_of(tmp_path / "saved", objects_column="boxes")
    )
    stream = load_detection(config_of(tmp_path / "saved", streaming=True)).eval
    assert [len(item["labels"]["boxes"]) for item in stream] == [2, 0, 1]


def test_a_stream_of_a_folder(make_set: Make) -> None:
    data = load_detection(config_of(make_set(), streaming=True))
    assert sorted(len(item["labels"]["boxes"]) for item in data.train) == [0, 1, 2]


def test_an_image_found_broken_later_does_not_count(make_set: Make) -> None:
    root = make_set()
    data = load_detection(config_of(root, on_error="skip", check="none"))
    (root / "val" / "0.png").write_bytes(b"")
    item = data.eval[0]
    assert item["labels"]["image_id"].tolist() == [-1] and item["labels"]["boxes"].shape == (0, 4)
    assert data.eval[2]["labels"]["image_id"].tolist() == [9]


def test_blood_cells(shared_data: Path) -> None:
    root = shared_data / "bccd"
    if not root.is_dir():
        pytest.skip("no blood cells")
    changes = {"test_split": "test", "check": "none", "image_size": [120, 160]}
    one, two = (load_detection(config_of(root, annotations=way, **changes)) for way in ("auto", COCO))
    assert one.id2label == two.id2label == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert one.facts["splits"] == two.facts["splits"] == {"train": 205, "eval": 87, "test": 72}
    counts = [
        np.bincount(np.concatenate([note.classes for note in data.test.source.annotations])) for data in (one, two)
    ]
    assert counts[0].tolist() == counts[1].tolist() == [805, 71, 69]
    torch.testing.assert_close(one.eval[3], two.eval[3])


def test_boxes_that_begin_beyond_the_border_are_cut_and_no_corners() -> None:
    boxes = np.array([[-3.0, -3.0, 30.0, 30.0]])
    numbers = np.zeros(1, dtype=np.int64)
    objects = fit_to_image(Annotation(numbers, boxes, numbers, boxes.prod(axis=1), numbers, 0), 80, 100, "a.jpg")
    assert objects.boxes.tolist() == [[0, 0, 27, 27]] and not objects.looks_xyxy
    assert all("is cut" in text for text in objects.warnings)
