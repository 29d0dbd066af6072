"""Folders with the same few objects in each layout of boxes that people have, under names that are hard to read."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ["cell", "Zelle 2", "emu"]
COLOURS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


@dataclass(frozen=True)
class Picture:
    """An image with its objects."""

    split: str
    name: str
    boxes: tuple[tuple[int, int, int, int], ...]  # x, y, width, height, upright
    labels: tuple[int, ...]
    size: tuple[int, int] = (40, 32)  # width, height, upright
    turned: bool = False  # by EXIF

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    def write(self, folder: Path) -> Path:
        """Save it in a folder; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(self.name)).integers(90, 160, (self.size[1], self.size[0], 3), np.uint8)
        for (x, y, width, height), label in zip(self.boxes, self.labels, strict=True):
            pixels[y : y + height, x : x + width] = COLOURS[label]
        picture, options = Image.fromarray(pixels), dict[str, Any]()
        if self.turned:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        if self.name.endswith(".png"):
            picture = picture.quantize(64)
        picture.save(folder / self.name, **options)
        return folder / self.name


PICTURES = [
    Picture("train", "IMG 1.JPG", ((2, 3, 10, 8), (20, 10, 12, 9)), (0, 2)),
    Picture("train", "Größe_2.jpeg", ((4, 4, 20, 20),), (1,), (48, 32), turned=True),
    Picture("train", "a.b.png", ((1, 1, 16, 12),), (0,)),
    Picture("train", "4 (empty).jpg", (), ()),
    Picture("val", "5.jpg", ((8, 8, 16, 16), (0, 0, 8, 8)), (2, 0)),
    Picture("val", "sechs.PNG", ((10, 2, 14, 20),), (1,)),
]


def yolo_line(picture: Picture, index: int, polygon: bool = False) -> str:
    """A line of a label file."""
    (x, y, width, height), (across, down) = picture.boxes[index], picture.size
    if polygon:
        corners = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
        numbers = [number for a, b in corners for number in (a / across, b / down)]
    else:
        numbers = [(x + width / 2) / across, (y + height / 2) / down, width / across, height / down]
    return " ".join([str(picture.labels[index]), *(f"{number:.8f}" for number in numbers)])


def write_labels(picture: Picture, folder: Path, polygon: bool = False, ending: str = ".txt") -> None:
    """The label file of a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [yolo_line(picture, index, polygon) for index in range(len(picture.boxes))]
    stem = unicodedata.normalize("NFD", picture.stem)  # as macOS writes it
    (folder / f"{stem}{ending}").write_text("\n".join(lines) + "\n" * bool(lines), encoding="utf-8")


def yolo(root: Path, pictures: Sequence[Picture] = PICTURES, polygon: bool = False) -> None:
    """Split folders below images/ and labels/, as Ultralytics has them; the yaml names another machine's folder."""
    for picture in pictures:
        picture.write(root / "images" / picture.split)
        write_labels(picture, root / "labels" / picture.split, polygon)
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
    text = f"path: /home/someone/datasets/{root.name}  # theirs\ntrain: images/train\nval: images/val\nnames:\n{names}"
    (root / "data.yaml").write_text(text, encoding="utf-8")


def roboflow_yolo(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """Split folders above; paths that are wrong by one folder, a test split that is not there, a list of names."""
    for picture in pictures:
        folder = root / {"val": "valid"}.get(picture.split, picture.split)
        picture.write(folder / "images")
        write_labels(picture, folder / "labels")
    lines = ["train: ../train/images", "val: ../valid/images", "test: ../test/images", "", "nc: 3", f"names: {NAMES}"]
    (root / "data.yaml").write_text("\n".join(lines), encoding="utf-8")


def darknet(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """Labels beside the images, and lists of the images."""
    lists: dict[str, list[str]] = {}
    for picture in pictures:
        picture.write(root / "obj_train_data")
        write_labels(picture, root / "obj_train_data", ending=".TXT")
        lists.setdefault(picture.split, []).append(f"data/obj_train_data/{picture.name}")
    for split, lines in lists.items():
        (root / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
    (root / "obj.names").write_text("\n".join(NAMES) + "\n\n", encoding="utf-8")
    text = "classes = 3\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\nbackup = backup/\n"
    (root / "obj.data").write_text(text, encoding="utf-8")


def label_img(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """One folder of images, labels and classes.txt."""
    for picture in pictures:
        picture.write(root)
        write_labels(picture, root)
    (root / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")


def voc_xml(picture: Picture, file_name: str, difficult: Sequence[int] = (), first: int = 1) -> str:
    """The annotations of a picture, whose pixels count from `first`."""
    objects = "".join(
        f"<object><name>{NAMES[label]}</name><difficult>{int(index in difficult)}</difficult><bndbox><xmin>{x + first}"
        f"</xmin><ymin>{y + first}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>"
        for index, ((x, y, width, height), label) in enumerate(zip(picture.boxes, picture.labels, strict=True))
    )
    size = f"<size><width>{picture.size[0]}</width><height>{picture.size[1]}</height><depth>3</depth></size>"
    return f"<annotation><folder>x</folder><filename>{file_name}</filename>{size}{objects}</annotation>"


def voc(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """VOCdevkit/VOC2012, with wrong endings in the xml files, as tools write them."""
    home = root / "VOCdevkit" / "VOC2012"
    for folder in ("Annotations", "ImageSets/Main"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        picture.write(home / "JPEGImages")
        text = voc_xml(picture, f"{picture.stem}.bmp")
        (home / "Annotations" / f"{picture.stem}.xml").write_text(text, encoding="utf-8")
    for split in ("train", "val"):
        lines = [picture.stem for picture in pictures if picture.split == split]
        (home / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
        lines = [f"{line}  {number % 2 * 2 - 1}" for number, line in enumerate(lines)]
        (home / "ImageSets" / "Main" / f"cell_{split}.txt").write_text("\n".join(lines), encoding="utf-8")


def roboflow_voc(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """xml beside the images, counted from 0."""
    for picture in pictures:
        folder = root / {"val": "valid"}.get(picture.split, picture.split)
        picture.write(folder)
        text = voc_xml(picture, picture.name, first=0)
        (folder / f"{picture.stem}.xml").write_text(text, encoding="utf-8")


def coco_content(pictures: Sequence[Picture], before: str = "", polygons: bool = True) -> dict[str, Any]:
    """COCO json, with gaps in the ids of the categories."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, start=1):
        size = {"width": picture.size[0], "height": picture.size[1]}
        images.append({"id": number, "file_name": before + picture.name, **size})
        for (x, y, width, height), label in zip(picture.boxes, picture.labels, strict=True):
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 2 * label + 1, "iscrowd": 0}
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            entry |= {"bbox": [x, y, width, height], "area": width * height}
            annotations.append(entry | ({"segmentation": [corners]} if polygons else {}))
    categories = [{"id": 2 * index + 1, "name": name} for index, name in enumerate(NAMES)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write_json(file: Path, content: Any) -> None:
    """A json file, its folder made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def coco(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """As COCO 2017 is unpacked, with files of other answers beside."""
    for split in ("train", "val"):
        part = [picture for picture in pictures if picture.split == split]
        for picture in part:
            picture.write(root / f"{split}2017")
        write_json(root / "annotations" / f"instances_{split}2017.json", coco_content(part))
        captions = {"images": coco_content(part)["images"], "annotations": []}
        write_json(root / "annotations" / f"captions_{split}2017.json", captions)


def coco_one(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """One json of any name beside images/, as Label Studio writes it on Windows."""
    for picture in pictures:
        picture.write(root / "images")
    write_json(root / "result.json", coco_content(pictures, "images\\"))


def fiftyone(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """data/ and labels.json in a folder for each split."""
    for split in ("train", "val"):
        part = [picture for picture in pictures if picture.split == split]
        for picture in part:
            picture.write(root / split / "data")
        write_json(root / split / "labels.json", coco_content(part))


def roboflow_coco(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """A json in each split folder, with a group among its categories."""
    for split in ("train", "val"):
        part = [picture for picture in pictures if picture.split == split]
        folder = root / {"val": "valid"}.get(split, split)
        for picture in part:
            picture.write(folder)
        content = coco_content(part, polygons=False)
        content["categories"] = [
            {"id": 0, "name": "cell", "supercategory": "none"},
            *({**entry, "supercategory": "cell"} for entry in content["categories"]),
        ]
        write_json(folder / "_annotations.coco.json", content)


def csv_table(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """The tables of TensorFlow's tutorials."""
    for split in ("train", "val"):
        folder = root / {"val": "valid"}.get(split, split)
        lines: list[list[Any]] = [["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"]]
        for picture in (one for one in pictures if one.split == split):
            picture.write(folder)
            for (x, y, width, height), label in zip(picture.boxes, picture.labels, strict=True):
                lines.append([picture.name, *picture.size, NAMES[label], x, y, x + width, y + height])
        with (folder / "_annotations.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)


def mask_of(picture: Picture) -> np.ndarray:
    """Its classes for each pixel, 0 the background; the smaller object on top."""
    mask = np.zeros(picture.size[::-1], np.uint8)
    order = sorted(range(len(picture.boxes)), key=lambda index: -picture.boxes[index][2] * picture.boxes[index][3])
    for index in order:
        x, y, width, height = picture.boxes[index]
        mask[y : y + height, x : x + width] = picture.labels[index] + 1
    return mask


def roboflow_masks(root: Path, pictures: Sequence[Picture] = PICTURES) -> None:
    """Masks beside the images."""
    for picture in pictures:
        folder = root / {"val": "valid"}.get(picture.split, picture.split)
        picture.write(folder)
        Image.fromarray(mask_of(picture)).save(folder / f"{picture.stem}_mask.png")
        lines = ["Pixel Value, Class", "0, background", *(f"{n}, {name}" for n, name in enumerate(NAMES, start=1))]
        (folder / "_classes.csv").write_text("\n".join(lines), encoding="utf-8")


BOXES: dict[str, Callable[[Path], None]] = {
    "YOLO": yolo,
    "YOLO of Roboflow": roboflow_yolo,
    "YOLO of darknet": darknet,
    "YOLO of LabelImg": label_img,
    "VOC": voc,
    "VOC of Roboflow": roboflow_voc,
    "COCO": coco,
    "COCO in one file": coco_one,
    "COCO of FiftyOne": fiftyone,
    "COCO of Roboflow": roboflow_coco,
    "csv table": csv_table,
}
