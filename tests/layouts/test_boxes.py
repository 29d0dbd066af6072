"""Boxes, and masks drawn from outlines, in each layout that people have: what is read, and what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.load import DetectionData, load_detection
from cankd_hf.data.layouts import look
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

from .box_folders import (
    BOXES,
    NAMES,
    PICTURES,
    coco,
    coco_content,
    coco_one,
    csv_table,
    darknet,
    label_img,
    mask_of,
    roboflow_coco,
    roboflow_masks,
    roboflow_yolo,
    voc,
    voc_xml,
    write_json,
    yolo,
    yolo_line,
)

BY_STEM = {picture.stem: picture for picture in PICTURES}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder with a name that is hard to read."""
    (tmp_path / "Meine Zellen é").mkdir()
    return tmp_path / "Meine Zellen é"


def load(root: Path, **changes: Any) -> DetectionData:
    return load_detection(DataConfig(**({"path": str(root), "scale": [1.0, 1.0], "flip": 0.0} | changes)))


def problems_of(read: Callable[[], Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        read()
    return caught.value.problems


def objects(data: DetectionData) -> dict[str, list[tuple[str, list[float]]]]:
    """Stem of each image -> the names and boxes (x, y, width, height) of its objects."""
    found = {}
    for split in filter(None, (data.train, data.eval, data.test)):
        for index in range(len(split)):
            sample = split.raw(index)
            boxes = sample.target.boxes.clone()
            boxes[:, 2:] -= boxes[:, :2]
            names = [data.id2label[label] for label in sample.target.classes.tolist()]
            numbers = [[round(number, 3) for number in box] for box in boxes.tolist()]
            found[Path(sample.name).stem] = list(zip(names, numbers, strict=True))
    return found


EXPECTED = {
    picture.stem: [
        (NAMES[label], list(map(float, box))) for label, box in zip(picture.labels, picture.boxes, strict=True)
    ]
    for picture in PICTURES
}


@pytest.mark.parametrize("name", BOXES)
def test_the_same_boxes_from_each_layout(name: str, root: Path) -> None:
    BOXES[name](root)
    data = load(root)
    assert objects(data) == EXPECTED
    assert sorted(data.id2label.values()) == sorted(NAMES)
    whole = name in ("YOLO of LabelImg", "COCO in one file")  # without splits: a part is held out
    assert (len(data.train), len(data.eval)) == ((5, 1) if whole else (4, 2))


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


def test_each_wrong_line_is_named_with_its_number(root: Path) -> None:
    yolo(root)
    lines = {
        "0 0.5 0.5 0.2": "got 4",
        "7 0.5 0.5 0.1 0.1": "expected a class of 0..2, got 7",
        "0 12 30 5 6": "divide x and width",
        "0 .5 .5 .1 .1 .9": "confidence",
        "0 a b c d": "expected numbers",
        "0 nan .1 .1 .1": "expected numbers",
        "1.5 .1 .1 .1 .1": "whole number",
        "-1 .1 .1 .1 .1": "whole number",
        "0 .5 .5 -.005 .1": "width and a height",
    }
    (root / "labels/train/IMG 1.txt").write_text("\n".join(lines))
    (root / "labels/val/5.txt").write_bytes(b"\xff0 1")
    told = problems_of(lambda: load(root))
    for number, said in enumerate(lines.values(), start=1):
        (one,) = [text for text in told if f"labels/train/IMG 1.txt line {number}: " in text]
        assert said in one
    assert any(text.startswith("labels/val/5.txt: expected UTF-8") for text in told)
    assert len(told) == len(lines) + 1


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


def test_with_skip_wrong_lines_are_left_out_and_counted(root: Path) -> None:
    yolo(root)
    file = root / "labels/train/IMG 1.txt"
    file.write_text(f"0 1 1\n{yolo_line(PICTURES[0], 1)}")
    data = load(root, on_error="skip")
    assert objects(data) == EXPECTED | {"IMG 1": EXPECTED["IMG 1"][1:]}
    assert data.facts["dropped_boxes"]["count"] == 1


def test_paths_of_another_machine_stay_in_the_folder(root: Path) -> None:
    darknet(root)
    outside = root.parent / "secret.jpg"
    shutil.copy(root / "obj_train_data/5.jpg", outside)
    (root / "val.txt").write_text(
        f"C:\\data\\obj_train_data\\5.jpg\n/x/y/obj_train_data/SECHS.png\n{outside}\n../secret.jpg"
    )
    told = problems_of(lambda: load(root))
    assert [text.partition(":")[0] for text in told] == ["val.txt line 3", "val.txt line 4"]
    lines = (root / "val.txt").read_text().splitlines()
    (root / "val.txt").write_text("\n".join(lines[:2]))
    assert objects(load(root)) == EXPECTED


def test_what_has_no_label_file_and_what_has_no_image(root: Path) -> None:
    yolo(root)
    (root / "labels/train/4 (empty).txt").unlink()
    (root / "labels/train/lonely.txt").write_text("0 .5 .5 .1 .1")
    data = load(root)
    assert objects(data) == EXPECTED
    told = "\n".join(data.facts["warnings"])
    assert "1 of 4 images have no label file, first images/train/4 (empty).jpg" in told
    assert "1 label files belong to no image and are not used, first labels/train/lonely.txt" in told


def test_validation_on_the_training_images_is_told(root: Path) -> None:
    yolo(root)
    file = root / "data.yaml"
    file.write_text(file.read_text().replace("images/val", "images/train"))
    assert any("validation has the images of train" in text for text in load(root).facts["warnings"])


def test_key_points_are_left_out(root: Path) -> None:
    yolo(root)
    (root / "data.yaml").write_text((root / "data.yaml").read_text() + "kpt_shape: [2, 3]\n")
    for file in (root / "labels").rglob("*.txt"):
        lines = [f"{line} 0.1 0.1 2 0.2 0.2 0" for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines))
    assert objects(load(root)) == EXPECTED
    assert "masks" not in look(root).kinds


@pytest.mark.parametrize(
    "text, said",
    [("train: {{{", "not valid YAML"), ("names: 3\ntrain: images/train", "names: expected a list"), ("a: 1", "")],
)
def test_a_broken_description(text: str, said: str, root: Path) -> None:
    yolo(root)
    (root / "data.yaml").write_text(text)
    if said:
        assert any(said in text for text in problems_of(lambda: load(root)))
    else:  # no description, but one of something else
        assert len(load(root).id2label) == 3


def test_names_that_nobody_says_are_counted_and_can_be_given(root: Path) -> None:
    label_img(root)
    (root / "classes.txt").unlink()
    data = load(root)
    assert data.id2label == {0: "class_0", 1: "class_1", 2: "class_2"}
    (told,) = [text for text in data.facts["warnings"] if "labels.json" in text]
    content = json.loads(told[told.index("{") :])
    content["id2label"] |= {str(number): name for number, name in enumerate([*NAMES, "never seen"])}
    write_json(root / "labels.json", content)
    data = load(root)
    assert data.id2label == dict(enumerate([*NAMES, "never seen"]))
    assert objects(data) == EXPECTED


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


@pytest.mark.parametrize("name", ["classes.txt", "data.yaml", "labels/train/5.txt", "val.txt"])
def test_no_small_file_leads_out_of_the_folder(name: str, root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_text("root:x:0:0\n")
    yolo(root)
    if name != "data.yaml":
        (root / "data.yaml").write_text(
            "train: images/train\nval: val.txt\n" + "names: [a, b, c]\n" * (name != "classes.txt")
        )
        (root / "val.txt").write_text("images/val/5.jpg\n")
    target = root / {"labels/train/5.txt": "labels/train/IMG 1.txt"}.get(name, name)
    target.unlink(missing_ok=True)
    target.symlink_to(secret)
    told = "\n".join(problems_of(lambda: load(root, eval_split="validation")))
    assert "link to" in told and "root:x" not in told


def test_lists_of_images_without_a_description(root: Path) -> None:
    yolo(root)
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("\n".join(NAMES))
    (root / "train.txt").write_text("./images/train/IMG 1.JPG\n./images/train/a.b.png\n")
    (root / "val.txt").write_text("./images/val/5.jpg\n")
    data = load(root)
    assert objects(data) == {stem: EXPECTED[stem] for stem in ("IMG 1", "a.b", "5")}
    assert "3 images are in no split of the lists of images" in "\n".join(data.facts["warnings"])


def test_two_classes_of_one_name_and_a_bomb(root: Path) -> None:
    yolo(root)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, a]\n")
    told = problems_of(lambda: load(root))
    assert told == ["data.yaml: expected a name of its own for each class, got 'a' for [0, 2]; rename them"]
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
    (root / "data.yaml").write_text(f"a0: &a0 [x]\n{levels}\nnames: *a11\ntrain: images/train\n")
    assert "at most 20,000 values" in problems_of(lambda: load(root))[0]


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
