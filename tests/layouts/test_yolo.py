"""Sets of YOLO: what is wrong with them, and what nobody says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cankd_hf.data.layouts import look

from .box_folders import NAMES, PICTURES, darknet, label_img, write_json, yolo, yolo_line
from .loading import EXPECTED, load, objects, problems_of


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
