"""Boxes, and masks drawn from outlines, in each layout that people have: what is read, and what is wrong with it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.data.layouts import look
from cankd_hf.data.segmentation.load import load_segmentation

from .box_folders import (
    BOXES,
    NAMES,
    PICTURES,
    coco,
    coco_content,
    coco_one,
    csv_table,
    mask_of,
    roboflow_coco,
    roboflow_masks,
    roboflow_yolo,
    voc,
    voc_xml,
    write_json,
    yolo,
)
from .loading import EXPECTED, load, objects, problems_of
from .wild_folders import WILD, WITHOUT_SPLITS

BY_STEM = {picture.stem: picture for picture in PICTURES}


@pytest.mark.parametrize("name", {**BOXES, **WILD})
def test_the_same_boxes_from_each_layout(name: str, root: Path) -> None:
    {**BOXES, **WILD}[name](root)
    data = load(root)
    assert objects(data) == EXPECTED
    assert sorted(data.id2label.values()) == sorted(NAMES)
    # of a set without splits a part is held out
    assert (len(data.train), len(data.eval)) == ((5, 1) if name in WITHOUT_SPLITS else (4, 2))


@pytest.mark.parametrize("make", [partial(yolo, polygon=True), coco, coco_one, roboflow_masks], ids=range(4))
def test_the_same_masks_from_each_layout(make: Callable[[Path], None], root: Path) -> None:
    make(root)
    data = load_segmentation(DataConfig(path=str(root)))
    assert list(data.id2label.values()) == ["background", *NAMES]
    for split in (data.train, data.eval):
        for index in range(len(split)):
            sample = split.raw(index)
            assert (sample.label.numpy() == mask_of(BY_STEM[Path(sample.name).stem])).all(), sample.name


def test_run_lengths_crowds_and_boxes_without_outline(root: Path) -> None:
    coco_one(root)
    file = root / "result.json"
    content = json.loads(file.read_text())
    size = [32, 40]
    first, second = content["annotations"][:2]
    first |= {"segmentation": {"size": size, "counts": [32 * 2, 32 * 3, 32 * 35]}, "iscrowd": 1}  # columns 2, 3, 4
    del second["segmentation"]
    write_json(file, content)
    data = load_segmentation(DataConfig(path=str(root), train_split="train", eval_split=None))
    mask = next(data.train.raw(n).label for n in range(6) if data.train.name(n).endswith("IMG 1.JPG"))
    assert (mask[:, 2:5] == 1).all() and (mask[:, :2] == 0).all()
    assert (mask[10:19, 20:32] == 255).all() and (mask[19:] != 255).all()
    assert any("1 objects have no outline" in warning for warning in data.facts["warnings"])
    first["segmentation"]["size"] = [9, 9]
    write_json(file, content)
    told = problems_of(lambda: load_segmentation(DataConfig(path=str(root))))
    assert "run lengths of the size [9, 9]" in told[0] and "IMG 1.JPG" in told[0]


def test_boxes_are_no_masks(root: Path) -> None:
    yolo(root)
    told = problems_of(lambda: load_segmentation(DataConfig(path=str(root))))
    assert len(told) == 1 and "YOLO" in told[0] and "boxes" in told[0]


def test_three_things_that_are_missing_are_told_at_once(root: Path) -> None:
    roboflow_yolo(root)
    text = (root / "data.yaml").read_text().replace("nc: 3", "nc: 5")
    (root / "data.yaml").write_text(text)
    shutil.rmtree(root / "valid")
    (root / "train/labels/IMG 1.txt").write_text("0 1 1")
    told = problems_of(lambda: load(root))
    assert len(told) == 3
    assert told[0].startswith("data.yaml: nc: expected 3") and "got 5" in told[0]
    assert "data.yaml: val: " in told[1] and "../valid/images" in told[1]
    assert told[2].startswith("train/labels/IMG 1.txt line 1")


def test_labels_json_gives_the_order_of_classes_that_xml_names(root: Path) -> None:
    voc(root)
    assert list(load(root).id2label.values()) == ["cell", "emu", "Zelle 2"]
    write_json(root / "labels.json", {"id2label": {"0": "other", "1": "emu", "2": "Zelle 2", "3": "cell"}})
    data = load(root)
    assert data.id2label == {0: "other", 1: "emu", 2: "Zelle 2", 3: "cell"}
    assert objects(data) == EXPECTED
    write_json(root / "labels.json", {"id2label": {"0": "emu"}})
    told = problems_of(lambda: load(root))
    assert len(told) == 1 and told[0].startswith("data.labels: expected the classes ['cell', 'emu', 'Zelle 2']")


def test_difficult_objects_are_left_out_of_losses_and_scores(root: Path) -> None:
    voc(root)
    home = root / "VOCdevkit/VOC2012/Annotations"
    (home / "IMG 1.xml").write_text(voc_xml(PICTURES[0], "x", difficult=[1]))
    data = load(root)
    sample = next(data.train.raw(n) for n in range(4) if data.train.name(n).endswith("IMG 1.JPG"))
    assert sample.target.iscrowd.tolist() == [0, 1]


def test_xml_with_entities_is_refused_with_all_other_problems(root: Path) -> None:
    voc(root)
    home = root / "VOCdevkit/VOC2012"
    laughs = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>'
    (home / "Annotations/IMG 1.xml").write_text(laughs)
    (home / "Annotations/a.b.xml").write_text("<annotation><obj")
    (home / "Annotations/5.xml").write_text("<annotation><object><name>emu</name></object></annotation>")
    (home / "ImageSets/Main/val.txt").write_text("5\nsechs\nlost\n")
    told = problems_of(lambda: load(root))
    assert len(told) == 4
    assert told[0] == "ImageSets/Main/val.txt line 3: expected an image of this name, got 'lost'"
    assert "entities" in next(text for text in told if "IMG 1.xml" in text)
    assert "no <bndbox>" in next(text for text in told if "5.xml object 1 (emu)" in text)


def test_only_a_list_of_training_and_validation_together(root: Path) -> None:
    voc(root)
    lists = root / "VOCdevkit/VOC2012/ImageSets/Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + "\n5  1\nsechs -1")
    for name in ("train", "val"):
        (lists / f"{name}.txt").unlink()
    (lists / "test.txt").write_text("000001\n000002\n")  # of an archive that was not unpacked
    data = load(root)
    assert objects(data) == EXPECTED
    told = "\n".join(data.facts["warnings"])
    assert "trainval is the train split" in told and "none of its 2 images is here" in told


def test_two_coco_files_for_one_split(root: Path) -> None:
    coco_one(root)
    write_json(root / "second.json", coco_content(PICTURES[:2], "images/"))
    told = problems_of(lambda: load(root))
    assert len(told) == 1 and "result.json, second.json" in told[0] and "data.annotations" in told[0]
    (root / "second.json").rename(root / "of_train.json")
    assert objects(load(root, annotations="of_{split}.json", eval_split=None)) == {
        picture.stem: EXPECTED[picture.stem] for picture in PICTURES[:2]
    }
    data = load_segmentation(DataConfig(path=str(root), annotations="of_{split}.json", eval_split=None))
    assert len(data.train) == 2 and list(data.id2label.values()) == ["background", *NAMES]


def test_images_of_another_split_are_not_taken_for_those_of_this_one(root: Path) -> None:
    coco(root)
    (root / "train2017/a.b.png").rename(root / "val2017/a.b.png")
    told = problems_of(lambda: load(root))
    assert told[0] == "train2017/a.b.png: the file does not exist"


def test_the_group_of_roboflow_is_a_class_only_if_it_is_used(root: Path) -> None:
    roboflow_coco(root)
    for split in ("train", "valid"):
        file = root / split / "_annotations.coco.json"
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = "group"
        for entry in content["categories"][1:]:
            entry["supercategory"] = "group"
        content["annotations"][0]["category_id"] = 0
        write_json(file, content)
    assert list(load(root).id2label.values()) == ["group", *NAMES]


def test_each_wrong_line_of_a_table_is_named(root: Path) -> None:
    csv_table(root)
    file = root / "train/_annotations.csv"
    file.write_text(
        file.read_text() + "gone.jpg,1,1,cell,1,1,2,2\nIMG 1.JPG,40,32,cell,a,1,2,2\nIMG 1.JPG,40,32,emu,5,5,2,9\n"
    )
    told = problems_of(lambda: load(root))
    assert [text.partition(":")[0].rpartition(" ")[2] for text in told] == ["6", "7", "8"]
    assert "gone.jpg" in told[0]


def test_frames_of_several_films_have_the_same_names(root: Path) -> None:
    coco(root)
    for film in ("a", "b"):
        (root / f"train2017/{film}").mkdir()
        shutil.copy(root / "train2017/IMG 1.JPG", root / f"train2017/{film}/0001.jpg")
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "/else/where/b/0001.jpg"
    write_json(file, content)
    assert any(name.endswith("b/0001.jpg") for name in map(load(root).train.name, range(4)))
    content["images"][0]["file_name"] = "0001.jpg"  # which of them, nobody knows
    write_json(file, content)
    assert problems_of(lambda: load(root))[0].endswith("0001.jpg: the file does not exist")


def test_labels_json_of_fiftyone_is_no_labels_file(root: Path) -> None:
    for picture in PICTURES:
        picture.write(root / "data")
    write_json(root / "labels.json", coco_content(PICTURES))
    assert objects(load(root)) == EXPECTED
    assert len(load_segmentation(DataConfig(path=str(root))).id2label) == 4


@pytest.mark.parametrize("name", ["YOLO", "VOC", "COCO", "csv table"])
def test_what_is_found_says_splits_classes_and_sizes(name: str, root: Path) -> None:
    BOXES[name](root)
    found = look(root)
    assert {split: part.size for split, part in found.splits.items()} == {"train": 4, "validation": 2}
    assert found.kinds[0] == "boxes" and found.labels is not None and found.label_source
    assert sorted(found.labels.id2label.values()) == sorted(NAMES)
    content = found.splits["train"].content
    assert content.objects is not None and len(content.objects.boxes) == 4 and len(content.rows) == 4


def test_masks_are_drawn_in_loading_processes_and_streams(root: Path) -> None:
    yolo(root, polygon=True)
    data = load_segmentation(DataConfig(path=str(root), image_size=[32, 40], scale=[1.0, 1.0], flip=0.0))
    again = pickle.loads(pickle.dumps(data.eval))
    assert (again[0]["labels"] == data.eval[0]["labels"]).all()
    streamed = load_segmentation(DataConfig(path=str(root), image_size=[32, 40], streaming=True))
    assert (next(iter(streamed.eval))["labels"] == data.eval[0]["labels"]).all()
    assert len(list(load(root, streaming=True).train)) == 4


def test_outlines_for_another_size_are_refused(root: Path) -> None:
    coco_one(root)
    content = json.loads((root / "result.json").read_text())
    content["images"][1] |= {"width": 32, "height": 48}  # lying on its side, as it is stored
    write_json(root / "result.json", content)
    told = problems_of(lambda: load_segmentation(DataConfig(path=str(root))))
    assert "Größe_2.jpeg: outlines are for 32 x 48 pixels, the image has 48 x 32" in told[0]


def test_wrong_masks_do_not_matter_for_boxes_nor_wrong_xml_for_masks(root: Path) -> None:
    yolo(root)
    for picture in PICTURES:
        picture.write(root / "masks" / picture.split)
    for file in (root / "masks" / "train").iterdir():
        file.rename(file.with_stem(f"{file.stem} of nothing"))
    assert objects(load(root)) == EXPECTED
    roboflow_masks(root / "other")
    (root / "other" / "a.xml").write_text("<annotation ")
    assert len(load_segmentation(DataConfig(path=str(root / "other"))).id2label) == 4
