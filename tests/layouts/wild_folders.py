"""More ways in which the same boxes are kept, as found in exports and archives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .box_folders import NAMES, PICTURES, coco, coco_content, roboflow_yolo, voc_xml, write_json, write_labels, yolo


def other_case(root: Path) -> None:
    """Folders whose names differ in case from those in data.yaml."""
    yolo(root)
    (root / "images" / "train").rename(root / "images" / "Train")
    (root / "labels" / "val").rename(root / "labels" / "VAL")
    (root / "images").rename(root / "Images")
    (root / "labels").rename(root / "Labels")


def classes_with_labels(root: Path) -> None:
    """classes.txt among the label files, no data.yaml."""
    yolo(root)
    (root / "data.yaml").unlink()
    for split in ("train", "val"):
        (root / "labels" / split / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")


def label_studio_yolo(root: Path) -> None:
    """notes.json has categories, and is no COCO json."""
    for picture in PICTURES:
        picture.write(root / "images")
        write_labels(picture, root / "labels")
    (root / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    write_json(root / "notes.json", {"categories": [{"id": 0, "name": "cell"}], "info": {}})


def kaggle_voc(root: Path) -> None:
    """images/ and annotations/ with xml."""
    (root / "annotations").mkdir()
    for picture in PICTURES:
        picture.write(root / "images")
        (root / "annotations" / f"{picture.stem}.xml").write_text(voc_xml(picture, picture.name), encoding="utf-8")


def split_voc(root: Path) -> None:
    """The same in split folders."""
    for picture in PICTURES:
        picture.write(root / picture.split / "images")
        folder = root / picture.split / "annotations"
        folder.mkdir(exist_ok=True)
        (folder / f"{picture.stem}.xml").write_text(voc_xml(picture, picture.name), encoding="utf-8")


def json_by_split(root: Path) -> None:
    """train.json and val.json beside one folder of images."""
    for picture in PICTURES:
        picture.write(root / "images")
    for split in ("train", "val"):
        write_json(root / f"{split}.json", coco_content([one for one in PICTURES if one.split == split]))


def cvat_coco(root: Path) -> None:
    """instances_default.json."""
    for picture in PICTURES:
        picture.write(root / "images" / "default")
    write_json(root / "annotations" / "instances_default.json", coco_content(PICTURES))


def unzipped_yolo(root: Path) -> None:
    """In a folder of its own, with other files beside it."""
    roboflow_yolo(root / "cells.v3i.yolov8")
    (root / "cells.v3i.yolov8.zip").write_bytes(b"PK")
    (root / "README.txt").write_text("1 0.5 0.5 0.1 0.1")


def unzipped_coco(root: Path) -> None:
    """The same of COCO."""
    coco(root / "coco2017")
    (root / "README.txt").write_text("read me")


WILD: dict[str, Callable[[Path], None]] = {
    "YOLO in another case": other_case,
    "YOLO with classes.txt among the labels": classes_with_labels,
    "YOLO of Label Studio": label_studio_yolo,
    "VOC of Kaggle": kaggle_voc,
    "VOC in split folders": split_voc,
    "COCO by split": json_by_split,
    "COCO of CVAT": cvat_coco,
    "YOLO unzipped": unzipped_yolo,
    "COCO unzipped": unzipped_coco,
}
WITHOUT_SPLITS = ("YOLO of Label Studio", "VOC of Kaggle", "COCO of CVAT", "YOLO of LabelImg", "COCO in one file")
