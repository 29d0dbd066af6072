"""Folders that hold what no tool should have written: told, or left out and told, and never a traceback."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cankd_hf.cli.data import main as look_command
from cankd_hf.cli.init import main as init_command
from cankd_hf.cli.looking import Seen, look_at
from cankd_hf.data.detection.outlines import Outlines
from cankd_hf.data.layouts import look
from cankd_hf.errors import InputError
from cankd_hf.runs.folder import data_files


def image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), (90, 20, 160)).save(file)


def yolo(root: Path, lines: str, yaml: str | None = None) -> Seen:
    for number in range(3):
        image(root / f"images/{number}.png")
        (root / "labels").mkdir(exist_ok=True)
        (root / f"labels/{number}.txt").write_text("0 .5 .5 .9 .9\n" if number else lines)
    if yaml is not None:
        (root / "data.yaml").write_text(yaml)
    return look_at(str(root), None, 10)


def coco(root: Path, annotations: list[Any], categories: list[Any], images: list[Any] | None = None) -> None:
    entries = images or [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
    for number in range(2):
        image(root / f"{number}.png")
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))


def test_names_that_are_no_utf8_are_left_out_and_told(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / name / "1.png")
    os.makedirs(os.fsencode(tmp_path) + b"/\xff\xfe")
    found = look(tmp_path, "classes")
    assert found.labels is not None and [*found.labels.id2label.values()] == ["cat", "dog"]
    assert any("no UTF-8" in note and "\\udcff" in note for note in found.notes)


def test_classes_of_two_forms_of_a_letter_are_one(tmp_path: Path) -> None:
    for split, form in (("train", "NFD"), ("val", "NFC")):
        for name in ("Ä", "b"):
            image(tmp_path / split / unicodedata.normalize(form, name) / "1.png")
    found = look(tmp_path, "classes")
    assert found.labels is not None and len(found.labels.id2label) == 2


def test_class_names_that_would_break_lines_are_refused(tmp_path: Path) -> None:
    for name in ("a\nb\x1b[31m", "c\x00d".replace("\x00", "\x07"), "e"):
        image(tmp_path / name / "1.png")
    with pytest.raises(InputError) as error:
        look(tmp_path, "classes")
    assert len(error.value.problems) == 2 and "\\x1b" in error.value.problems[0]


def test_names_in_a_data_yaml_without_splits_are_used(tmp_path: Path) -> None:
    seen = yolo(tmp_path, "1 .5 .5 .9 .9\n", "names: [tree, bush]\n")
    assert [*seen.overview.labels.id2label.values()] == ["tree", "bush"]


def test_a_data_yaml_with_names_alone_makes_no_yolo_set_of_images(tmp_path: Path) -> None:
    image(tmp_path / "1.png")
    (tmp_path / "data.yaml").write_text("names: [tree]\n")
    assert look(tmp_path).layout == "images without labels"


def test_lines_that_are_left_out_are_counted_by_image(tmp_path: Path) -> None:
    seen = yolo(tmp_path, "0 .5 .5 .9 .9\nx\n0 1\n0 nan 1 1 1\n")
    assert any("1 image with boxes that are left out" in problem for problem in seen.problems)


def test_coco_ids_as_text_and_all_faults_at_once(tmp_path: Path) -> None:
    texts = [{"id": str(number), "file_name": f"{number}.png"} for number in range(2)]
    box = {"id": 1, "image_id": "0", "category_id": "1", "bbox": [1, 1, 20, 20]}
    coco(tmp_path / "texts", [box], [{"id": "1", "name": "cat"}], texts)
    seen = look_at(str(tmp_path / "texts"), None, 10)
    assert seen.overview.counts["train"] == {0: 1} and not any("category" in problem for problem in seen.problems)
    coco(tmp_path / "bad", [5, {}], [{"id": 1}, {"name": "x"}], [{"id": 1}, None])
    with pytest.raises(InputError) as error:
        look(tmp_path / "bad").splits["train"].content  # noqa: B018
    assert len(error.value.problems) == 6


@pytest.mark.parametrize(
    "given",
    [
        {"counts": [10, -5, 1275], "size": [32, 40]},
        {"counts": [10, 2**40], "size": [32, 40]},
        {"counts": 5, "size": [32, 40]},
        {"counts": [1280], "size": 5},
        {"counts": "P`n`0001```````````", "size": [32, 40]},
    ],
)
def test_run_lengths_that_do_not_fit_are_told(given: Any) -> None:
    outlines = Outlines()
    for one in (given, {"counts": [640, 640], "size": [32, 40]}, {}):
        outlines.add(one)
    with pytest.raises(ValueError):
        outlines.draw(0, 32, 40)
    assert outlines.draw(1, 32, 40).sum() == 640 and not outlines.has(2)


def test_run_lengths_that_do_not_decode_are_told(tmp_path: Path) -> None:
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 20, 20]}
    coco(
        tmp_path,
        [{**box, "segmentation": {"counts": "P`n`0001```````````", "size": [32, 40]}}],
        [{"id": 1, "name": "cat"}],
    )
    seen = look_at(str(tmp_path), "masks", 10)
    assert any("an outline cannot be drawn" in problem for problem in seen.problems)


def test_masks_beside_depth_maps_are_no_images_without_depth(tmp_path: Path) -> None:
    image(tmp_path / "images" / unicodedata.normalize("NFD", "Ä.PNG"))
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / unicodedata.normalize("NFC", "ä.npy"), np.ones((32, 40), np.float32))
    image(tmp_path / "masks" / "Ä.png")
    found = look(tmp_path, "depths")
    assert found.splits["train"].size == 1 and not found.notes


def test_an_output_that_takes_no_file_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x.png"
    folder.mkdir()
    image(tmp_path / "set" / "1.png")
    assert look_command([str(tmp_path / "set"), "--output", str(folder)]) == 2
    assert look_command([str(tmp_path / "set"), "--output", "/proc/x.png"]) == 2
    assert init_command([str(folder), "--force", "--yes", "--data", str(tmp_path / "set")]) == 2
    assert capsys.readouterr().err.count("error:") == 3


def test_images_and_masks_are_no_classes(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        image(tmp_path / name / "1.png")
    with pytest.raises(InputError, match="read as images and masks"):
        look(tmp_path, "classes")


def test_what_runs_write_into_a_folder_is_none_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / "set" / name / "1.png")
    before = data_files(str(tmp_path / "set"))
    run = tmp_path / "set" / "runs" / "one"
    image(run / "predictions.png")
    (run / "recipe.yaml").write_text("task: classification\n")
    image(run / "teacher" / "predictions.png")
    monkeypatch.chdir(tmp_path / "set")
    assert look_command([".", "--task", "classes"]) == 0 and (tmp_path / "set_data.png").is_file()
    found = look(Path("."), "classes")
    assert found.splits["train"].size == 2 and data_files(str(tmp_path / "set")) == before


def test_circles_of_links_end(tmp_path: Path) -> None:
    image(tmp_path / "images" / "1.png")
    for name in "abc":
        (tmp_path / "images" / name).symlink_to(tmp_path)
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "x").touch()
    assert [*data_files(str(tmp_path), [str(tmp_path / "answers")])] == ["images/1.png"]


def test_pictures_that_cannot_be_written_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image(tmp_path / "set" / "1.png")
    (tmp_path / "here" / "set_data.png").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert look_command([str(tmp_path / "set"), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["splits"]["train"]["images"] == 1 and "could not be written" in said.err


def test_labels_that_no_layout_reads_are_told(tmp_path: Path) -> None:
    image(tmp_path / "1.png")
    (tmp_path / "README.txt").touch()
    assert not look(tmp_path).notes
    (tmp_path / "annotations.json").touch()
    assert "1 files that could hold labels" in look(tmp_path).notes[0] and not look(tmp_path, "images").notes
