"""Folders of images and masks as people have them, found by their path alone."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cankd_hf.config.data import DataConfig
from cankd_hf.data.features.load import load_images
from cankd_hf.data.layouts import look
from cankd_hf.data.segmentation.load import load_segmentation

from .folders import (
    COLOURS,
    black_white,
    coloured,
    grey,
    indexed,
    labels_at,
    load,
    own,
    pairs,
    problems,
    scene,
    turned,
)

Make = Callable[[Path], Any]


NAMED: dict[str, Make] = {
    "above": lambda r: [pairs(r / s / "Images", r / s / "Labels", first=n) for s, n in (("train", 0), ("val", 9))],
    "below": lambda r: [pairs(r / "imgs" / s, r / "gt" / s, first=n) for s, n in (("Training", 0), ("valid", 9))],
    "joined": lambda r: [pairs(r / f"{s}_images", r / f"{s}_masks", first=n) for s, n in (("train", 0), ("val", 9))],
    "camvid": lambda r: [pairs(r / s, r / f"{s}annot", first=n) for s, n in (("train", 0), ("val", 9))],
    "one folder of masks": lambda r: [
        pairs(r / "JPEGImages" / s, r / "Annotations", first=n) for s, n in (("train", 0), ("dev", 9))
    ],
    "beside": lambda r: [
        pairs(r / s, r / s, write=lambda p, x: grey(p.with_name(f"{p.name}_mask"), x), first=n)
        for s, n in (("train", 0), ("val", 9))
    ],
    "equal stems beside": lambda r: [pairs(r / s, r / s, first=n) for s, n in (("train", 0), ("val", 9))],
    "numbered": lambda r: [
        pairs(
            r / s / "image", r / s / "label", 4, lambda p, x: grey(p.with_name(p.name.replace("image", "label")), x),
            first=n, stem="image_{}",
        )
        for s, n in (("train", 0), ("val", 9))
    ],
    "in cities": lambda r: [
        pairs(r / "photos" / s / city, r / "masks" / s / city, 2, first=n)
        for s, city, n in (("train", "Köln am Rhein", 0), ("train", "Lyon", 3), ("val", "Lyon", 9))
    ],
    "years": lambda r: [
        pairs(r / "images" / s, r / "labels" / s, first=n) for s, n in (("train2017", 0), ("val2017", 9))
    ],
    "sets": lambda r: [
        pairs(r / s / "images_512", r / s / "masks_512", first=n)
        for s, n in (("training_set", 0), ("validation_set", 9))
    ],
    "ISIC": lambda r: [
        pairs(
            r / f"ISIC2018_Task1-2_{s}_Input", r / f"ISIC2018_Task1_{s}_GroundTruth", 4,
            lambda p, x: grey(p.with_name(f"{p.name}_segmentation"), x), first=n, stem="ISIC_{}",
        )
        for s, n in (("Training", 0), ("Validation", 9))
    ],
    "pictures beside": lambda r: [
        [
            pairs(r / s / "img", r / s / "gt", first=n),
            pairs(r / s / "img", r / s / "gt", first=n, write=lambda p, x: scene(1)[0].save(f"{p}.jpg")),
            pairs(r / s / "img", r / s / "gt_vis", first=n, write=lambda p, x: grey(p, x * 0)),
            pairs(r / s / "overlay", r / s / "gt", first=n),
        ]
        for s, n in (("train", 0), ("val", 9))
    ],
    "unzipped": lambda r: [
        pairs(r / "My set (1)" / "v2" / s / "images", r / "My set (1)" / "v2" / s / "masks", first=n)
        for s, n in (("train", 0), ("val", 9))
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_usual_names_of_folders_and_files(tmp_path: Path, name: str) -> None:
    root = tmp_path / "a set"
    NAMED[name](root)
    (root / ".hidden").mkdir()
    for left in (root / "Thumbs.db", root / "._x.png", root / ".hidden" / "b.png"):
        left.write_bytes(b"\0")
    data = load(root)
    assert [len(data.train), len(data.eval)] == [4, 2 if name == "in cities" else 4]
    for part in (data.train, data.eval):
        for index in range(len(part)):
            assert np.array_equal(labels_at(part, index), own(part.name(index))), part.name(index)


THREE = ["class_0", "class_1", "class_2"]
MASKS: dict[str, tuple[Make, list[str]]] = {
    "grey": (grey, THREE),
    "black and white": (black_white, ["background", "foreground"]),
    "colours": (coloured, THREE),
    "RGBA": (partial(coloured, mode="RGBA"), THREE),
    "palette": (indexed, THREE),
    "one bit": (lambda p, x: Image.fromarray(x > 0).save(f"{p}.png"), ["background", "foreground"]),
    "16 bit": (lambda p, x: Image.fromarray(x.astype(np.uint16) * 999).save(f"{p}.png"), THREE),
    "from one on": (lambda p, x: grey(p, x + 1), THREE),
    "void": (lambda p, x: grey(p, np.where(x == 2, 255, x).astype(np.uint8)), ["background", "foreground"]),
    "smoothed": (
        lambda p, x: Image.fromarray((x > 0).astype(np.uint8) * 255).save(f"{p}.jpg"),
        ["background", "foreground"],
    ),
    "grey saved as RGB": (lambda p, x: Image.fromarray(x).convert("RGB").save(f"{p}.png"), THREE),
    "palettes that differ": (
        lambda p, x: indexed(p, (2 - x if int(p.name) % 2 else x), COLOURS[::-1] if int(p.name) % 2 else COLOURS),
        THREE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKS)
def test_masks_without_names_are_counted_and_the_line_to_paste_says_the_same(tmp_path: Path, kind: str) -> None:
    write, names = MASKS[kind]
    pairs(tmp_path / "images", tmp_path / "masks", 6, write)
    data = load(tmp_path)
    assert list(data.id2label.values()) == names
    told = [text for text in data.facts["warnings"] if "no class names" in text]
    assert len(told) == 1
    expected = [labels_at(data.train, index) for index in range(len(data.train))]
    for index, found in enumerate(expected):
        made = own(data.train.name(index))
        pairing = {*zip(made.ravel().tolist(), found.ravel().tolist(), strict=True)}
        # one class for each that was drawn; those of black and white masks are two
        assert len(pairing) == len({label for label, _ in pairing}) and {label for _, label in pairing} - {255}, kind
    (tmp_path / "labels.json").write_text(told[0].partition("labels.json: ")[2])
    again = load(tmp_path)
    assert again.id2label == data.id2label and not any("no class names" in text for text in again.facts["warnings"])
    assert all(np.array_equal(labels_at(again.train, index), found) for index, found in enumerate(expected))


def test_black_and_white_masks_of_which_only_the_names_are_given(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 6, black_white)
    (tmp_path / "labels.json").write_text('["nothing", "cell"]')
    data = load(tmp_path)
    assert set(np.unique(labels_at(data.train, 0)).tolist()) == {0, 1}
    assert any("0 and 255, used as nothing and cell" in text for text in data.facts["warnings"])


@pytest.mark.parametrize("count", [2, 3, 30])
def test_no_splits_hold_out_the_same_images_in_each_run(tmp_path: Path, count: int) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", count)
    test = "test" if count > 2 else None
    data = load(tmp_path, test_split=test)
    told = next(text for text in data.facts["warnings"] if "is held out" in text)
    parts = [[part.name(index) for index in range(len(part))] for part in (data.train, data.eval, data.test) if part]
    assert sum(parts, []) and len({*sum(parts, [])}) == count == sum(map(len, parts)) and all(parts)
    pasted = dict(part.split("=") for part in told.partition("as with ")[2].split(", "))
    again = load(tmp_path, **{key.removeprefix("data."): value for key, value in pasted.items()})
    assert [len(part) for part in (again.train, again.eval, again.test) if part] == [len(part) for part in parts]
    assert [again.eval.name(index) for index in range(len(again.eval))] == parts[1]
    alone = load_segmentation(DataConfig(path=str(tmp_path), test_split=test), splits=("train",))
    assert [alone.train.name(index) for index in range(len(alone.train))] == parts[0], "one split read alone differs"


def test_what_is_asked_for_of_splits(tmp_path: Path) -> None:
    NAMED["above"](tmp_path)
    data = load(tmp_path, test_split="test")
    assert data.test is None and any("no test split" in text for text in data.facts["warnings"])
    assert any("eval_split" in text and "'vall'" in text for text in problems(tmp_path, eval_split="vall"))
    shutil.rmtree(tmp_path / "val")
    pairs(tmp_path / "test" / "images", tmp_path / "test" / "masks", first=20)
    data = load(tmp_path, test_split="test")
    assert [len(data.train), len(data.eval), len(data.test)] == [3, 1, 4]


def test_images_that_lie_on_their_side_and_their_masks(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 3)
    for number, stored in ((3, False), (4, True)):  # masks of the upright image, and of the stored one
        picture, labels = scene(number)
        turned(tmp_path / "images" / f"{number:03d}.JPG", picture)
        grey(tmp_path / "masks" / f"{number:03d}", np.rot90(labels).copy() if stored else labels)
    data = load(tmp_path, eval_split=None)
    assert len(data.train) == 5
    for index in range(5):
        assert np.array_equal(labels_at(data.train, index), own(data.train.name(index)))


def test_names_that_only_seem_to_differ(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 3)
    image, mask = tmp_path / "images", tmp_path / "masks"
    os.rename(image / "000.jpg", image / unicodedata.normalize("NFD", "Größe 0.JPG"))
    os.rename(mask / "000.png", mask / "Größe 0.png")
    os.rename(image / "001.jpg", image / "Photo1.jpg")
    os.rename(mask / "001.png", mask / "photo1.PNG")
    os.rename(mask / "002.png", mask / "002.jpg.png")
    assert len(load(tmp_path, eval_split=None).train) == 3


def test_what_does_not_match_is_told_and_left_out(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 6)
    (tmp_path / "images" / "004.jpg").unlink()
    (tmp_path / "masks" / "005.png").unlink()
    data = load(tmp_path, eval_split=None)
    said = "\n".join(data.facts["warnings"])
    assert len(data.train) == 4 and "1 masks have no image and are not used, first masks/004.png" in said
    assert "1 of 5 images have no mask and are left out, first images/005.jpg" in said
    assert data.facts["skipped"]["files"] == {"images/005.jpg": "images/005.jpg: there is no mask of its name"}
    found = load_images(DataConfig(path=str(tmp_path), eval_split="validation"))
    assert len(found.train) + len(found.eval) == 5 and not found.facts["warnings"], "without labels every image counts"
    for file in sorted((tmp_path / "masks").iterdir())[:3]:
        file.rename(file.with_name(f"other{file.name}"))
    said = "\n".join(problems(tmp_path))
    assert "1 of 5 images" in said and "000, 001, 002" in said and "other000" in said


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    pairs(tmp_path / "images" / "train", tmp_path / "gone", 3)
    pairs(tmp_path / "gone", tmp_path / "masks" / "val", 3)
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "labels.json").write_text("[")
    said = problems(tmp_path)
    assert len(said) == 3
    for part in ("labels.json", "train: expected a mask for each of its 3", "validation: expected images for its 3"):
        assert any(part in text for text in said), said


def test_a_folder_without_masks_says_what_is_there(tmp_path: Path) -> None:
    pairs(tmp_path / "set" / "images", tmp_path / "set" / "masks", 3)
    said = problems(tmp_path / "set" / "images")
    assert len(said) == 1 and "3 .jpg" in said[0] and f"give data.path={tmp_path / 'set'}, where masks/ is" in said[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    assert "1 .txt" in problems(tmp_path / "other")[0]
    photographs = tmp_path / "photographs"
    pairs(photographs / "images", photographs / "masks", 3, lambda p, x: scene(int(p.name))[0].save(f"{p}.png"))
    assert "a colour for each class" in problems(photographs)[0]


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    pairs(tmp_path / "set" / "images", tmp_path / "other", 3)
    (tmp_path / "set" / "masks").symlink_to(tmp_path / "other")
    assert any("a link to" in text for text in problems(tmp_path / "set"))
    (tmp_path / "set" / "masks").unlink()
    shutil.copytree(tmp_path / "other", tmp_path / "set" / "masks")
    (tmp_path / "set" / "masks" / "000.png").unlink()
    (tmp_path / "set" / "masks" / "000.png").symlink_to(tmp_path / "other" / "000.png")
    assert any("masks/000.png" in text and "a link to" in text for text in problems(tmp_path / "set"))


def test_the_section_to_paste_reads_the_same(tmp_path: Path) -> None:
    pairs(tmp_path / "In here" / "images", tmp_path / "In here" / "masks", 10)
    found = look(tmp_path)
    section = found.section()
    assert section == json.loads(json.dumps(section)) and section["eval_split"] == "train[90%:@0]"
    one, other = load(tmp_path), load_segmentation(DataConfig(**section))
    assert [one.eval.name(0), len(one.train)] == [other.eval.name(0), len(other.train)]


def test_images_alone(tmp_path: Path) -> None:
    pairs(tmp_path / "train" / "a", tmp_path / "gone", 4)
    pairs(tmp_path / "test", tmp_path / "gone", 2, first=9)
    shutil.rmtree(tmp_path / "gone")
    found = look(tmp_path)
    assert (found.layout, found.kinds) == ("images without labels", ("images",))
    assert {name: split.size for name, split in found.splits.items()} == {"train": 4, "test": 2}
    names = found.splits["train"].content.rows.names
    assert [names[0], names[1]] == ["train/a/000.jpg", "train/a/001.jpg"]


def test_names_without_the_colours_of_coloured_masks(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", 4, coloured)
    (tmp_path / "labels.json").write_text('["nothing", "dog", "cat"]')
    said = problems(tmp_path)
    assert len(said) == 1 and "data.labels: expected the colour of each class" in said[0]
    pasted = json.loads(said[0].partition("in the order of the classes: ")[2])
    names = {"id2label": {"0": "nothing", "1": "dog", "2": "cat"}}
    (tmp_path / "labels.json").write_text(json.dumps(names | pasted))
    data = load(tmp_path)
    codes = sorted(range(3), key=lambda label: COLOURS[label])  # the order in which they were told
    expected = np.array([codes.index(label) for label in range(3)])[own(data.train.name(0))]
    assert np.array_equal(labels_at(data.train, 0), expected)


def test_photographs_whose_names_end_as_those_of_masks_do(tmp_path: Path) -> None:
    pairs(tmp_path, tmp_path / "gone", 12)
    shutil.rmtree(tmp_path / "gone")
    shutil.copy(tmp_path / "000.jpg", tmp_path / "000_p.jpg")
    assert look(tmp_path, "images").splits["train"].size == 13


def test_links_that_have_nothing_to_do_with_the_set(tmp_path: Path) -> None:
    pairs(tmp_path / "set" / "images", tmp_path / "set" / "masks", 4)
    (tmp_path / "set" / "results").symlink_to(tmp_path)
    (tmp_path / "set" / "images" / "again").symlink_to(tmp_path / "set")
    found = look(tmp_path / "set", "masks")
    assert found.splits["train"].size == 4 and any("results" in text for text in found.notes)


@pytest.mark.parametrize("given", ["images", "masks"])
def test_half_of_a_set_is_told_the_other_half(given: str, tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks")
    found = look(tmp_path / given)
    assert (
        found.kinds == ("images",)
        and f"a part of a set: data.path={tmp_path} reads images with their masks" in found.notes
    )
    assert not [note for note in look(tmp_path).notes if "a part of a set" in note]
