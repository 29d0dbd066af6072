"""Sets that many have, and the tables of classes that tools write."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cankd_hf.data.layouts import look
from cankd_hf.data.layouts.cityscapes import CLASSES
from cankd_hf.errors import InputError

from .folders import coloured, grey, indexed, labels_at, load, own, pairs, problems, scene


def cityscapes(root: Path, kinds: tuple[str, ...] = ("labelIds", "color")) -> None:
    """Two cities, and a test split whose masks are void."""
    for split, city, first in (("train", "aachen", 0), ("val", "lindau", 9), ("test", "berlin", 20)):
        for number in range(first, first + 3):
            picture, labels = scene(number)
            name = f"{city}_{number:06d}_000019"
            images, masks = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
            for folder in (images, masks):
                folder.mkdir(parents=True, exist_ok=True)
            picture.save(images / f"{name}_leftImg8bit.png")
            own_ids = np.array([CLASSES[0][1], CLASSES[13][1], 4], np.uint8)[labels] * (split != "test")
            for kind in kinds:
                if kind == "color":
                    coloured_ids = np.array([CLASSES[0][2], CLASSES[13][2], (0, 0, 0)], np.uint8)[labels]
                    Image.fromarray(coloured_ids * (split != "test")).save(masks / f"{name}_gtFine_color.png")
                else:
                    grey(masks / f"{name}_gtFine_{kind}", own_ids)
            (masks / f"{name}_gtFine_polygons.json").write_text("{}")


@pytest.mark.parametrize("kinds", [("labelIds", "color"), ("color",)])
def test_cityscapes(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    cityscapes(tmp_path, kinds)
    data = load(tmp_path, test_split="test")
    assert look(tmp_path, "masks").layout == "Cityscapes" and list(data.id2label.values())[13] == "car"
    assert len(data.id2label) == 19 and data.palette[0] == (128, 64, 128) and data.test is None
    assert np.array_equal(labels_at(data.train, 0), np.array([0, 13, 255])[scene(0)[1]])
    assert any("test: its masks are void" in text for text in data.facts["warnings"])


def test_cityscapes_with_train_ids_of_some_splits(tmp_path: Path) -> None:
    cityscapes(tmp_path)
    for split in ("train", "val"):
        for file in sorted(tmp_path.glob(f"gtFine/{split}/*/*_labelIds.png")):
            grey(file.with_name(file.name.replace("labelIds.png", "labelTrainIds")), np.full((32, 40), 3, np.uint8))
    first = load(tmp_path).train
    assert labels_at(first, 0).max() == 255 and 13 in labels_at(first, 0), "labelIds, which all splits have"


def test_ade20k(tmp_path: Path) -> None:
    for split, stem in (("training", "ADE_train_{}"), ("validation", "ADE_val_{}")):
        pairs(tmp_path / "images" / split, tmp_path / "annotations" / split, stem=stem)
    data = load(tmp_path)
    assert len(data.id2label) == 150 and data.id2label[149] == "flag"
    assert np.array_equal(labels_at(data.train, 0), np.array([255, 0, 1])[scene(0)[1]])
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t.1\t1\t1\t1\twall", "2\t.1\t1\t1\t0\tscreen, door"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    assert load(tmp_path).id2label == {0: "wall", 1: "screen"}


def voc(root: Path, stem: str = "2007_000{}") -> Path:
    """A development kit with lists, masks of objects beside, and an image that no list names."""
    inner = root / "VOCdevkit" / "VOC2012"
    for folder in ("SegmentationObject", "SegmentationClass"):
        pairs(
            inner / "JPEGImages",
            inner / folder,
            5,
            partial(indexed, colours=[(0, 0, 0), (128, 0, 0), (0, 128, 0)]),
            stem=stem,
        )
    lists = inner / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, numbers in (("train", (0, 1)), ("val", (2, 3)), ("trainval", (0, 1, 2, 3))):
        (lists / f"{name}.txt").write_text("".join(stem.format(f"{number:03d}") + "\n" for number in numbers))
    return inner


def test_pascal_voc_segmentation(tmp_path: Path) -> None:
    inner = voc(tmp_path)
    data = load(tmp_path)
    assert [len(data.train), len(data.eval)] == [2, 2] and data.id2label[20] == "tvmonitor"
    assert data.palette[20] == (0, 64, 128) and any("VOCdevkit/VOC2012" in text for text in data.facts["warnings"])
    assert np.array_equal(labels_at(data.train, 0), scene(0)[1])
    (inner / "ImageSets/Segmentation/val.txt").write_text("2007_000002\n2007_900000\n")
    (inner / "ImageSets/Segmentation/train.txt").write_text("gone\n")
    said = problems(tmp_path)
    assert len(said) == 2 and "2007_900000" in said[1] and "gone" in said[0]


TABLES = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:200,30,30::\ndog:30,30,200::\n",
    "class_dict.csv": "name,r,g,b\nbackground,0,0,0\ncat,200,30,30\ndog,30,30,200\n",
    "_classes.csv": "Pixel Value, Class\n0, background\n1, cat\n2, dog\n",
    "label_colors.txt": "0 0 0\tbackground\n200 30 30\tcat\n30 30 200\tdog\n",
    "classes.txt": "background\ncat\n\ndog\n",
    "labels.txt": "__ignore__\nbackground\ncat\ndog\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_classes(tmp_path: Path, table: str) -> None:
    by_colour = table in ("labelmap.txt", "class_dict.csv", "label_colors.txt")
    pairs(tmp_path / "images", tmp_path / "masks", 4, coloured if by_colour else grey)
    (tmp_path / table).write_text(TABLES[table])
    data = load(tmp_path)
    assert list(data.id2label.values()) == ["background", "cat", "dog"]
    assert np.array_equal(labels_at(data.train, 0), own(data.train.name(0)))
    assert look(tmp_path).label_source == table


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("labelmap.txt", "background:0,0,0::\n:1,2,3::\ncat:200,30::\n"),
        ("class_dict.csv", "name,r,g,b\nx,0,0,300\ncat,200,30,30\ndog\n"),
        ("label_colors.txt", "0 0 0\tbackground\ncat\n30 30 900\tdog\n"),
    ],
)
def test_all_lines_of_a_table_that_do_not_parse_are_told(tmp_path: Path, table: str, text: str) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 4, coloured)
    (tmp_path / table).write_text(text)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    lines = [problem.partition(" line ")[2][:1] for problem in error.value.problems]
    assert lines == (["2", "4"] if table == "class_dict.csv" else ["2", "3"]), error.value.problems


def test_void_in_a_table_is_no_class(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 4, coloured)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nVoid,0,0,0\ncat,200,30,30\ndog,30,30,200\n")
    data = load(tmp_path)
    assert list(data.id2label.values()) == ["cat", "dog"]
    assert np.array_equal(labels_at(data.train, 0), np.array([255, 0, 1])[own(data.train.name(0))])
