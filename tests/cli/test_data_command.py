"""`cankd data`: what it says of a folder, and the picture that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cankd_hf.__main__ import main
from cankd_hf.cli.data import parser
from cankd_hf.config.plain_yaml import parse_yaml
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import TASKS
from tests.instances.folders import write_instances
from tests.layouts import box_folders, folders


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What `cankd data ... --json` prints."""
    assert main(["data", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_masks_are_counted_drawn_and_given_as_a_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.pairs(tmp_path / "my föld/train/images", tmp_path / "my föld/train/masks", 5)
    folders.pairs(tmp_path / "my föld/val/images", tmp_path / "my föld/val/masks", 2, first=4)
    (tmp_path / "my föld/train/images/001.jpg").write_bytes(b"")
    found = told(capsys, tmp_path / "my föld", "--output", "seen.png")
    assert (found["labels"], found["task"], found["sampled"]) == ("masks", "segmentation", False)
    teacher, student = found["recipes"]  # no toy of drawn images
    assert teacher.startswith("camvid_lite2_teacher ") and student.startswith("camvid_lite0_seg ")
    assert all("'data.image_size=[64,64]' 'data.crop_size=[64,64]'" in line for line in found["recipes"])
    assert found["splits"] == {"train": {"images": 5, "read": 5}, "validation": {"images": 2, "read": 2}}
    kept = [folders.scene(number)[1] for number in (0, 2, 3, 4)]
    share = np.mean([(labels == 1).mean() for labels in kept])
    second = next(one for one in found["classes"] if one["name"] == "class_1")
    assert second["shares"]["train"] == pytest.approx(share, abs=1e-6) and second["images"]["train"] == 4
    said = "\n".join(found["problems"])
    assert "001.jpg: expected an image that decodes, got an empty file" in said
    assert "1 files of validation are in another split too, first val/images/004.jpg" in said
    with Image.open("seen.png") as picture:
        assert picture.width > 1500 and len(set(picture.convert("RGB").resize((60, 40)).tobytes())) > 50
    assert main(["data", str(tmp_path / "my föld")]) == 0
    printed = capsys.readouterr().out
    section = printed.partition("The section for a recipe:")[2].partition("What to do next")[0]
    assert parse_yaml(section, "it")[0]["data"] == found["data"]
    assert "my föld" in section and (tmp_path / "my_föld_data.png").is_file()
    assert max(map(len, printed.partition("The section")[0].splitlines())) <= 160  # the line to paste is not broken


def test_boxes_are_counted_in_all_images_though_some_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    box_folders.yolo(tmp_path / "set")
    found = told(capsys, tmp_path / "set", "--limit", "1")
    assert (found["labels"], found["sampled"], found["unit"]) == ("boxes", True, "boxes")
    assert all(split["read"] == 1 for split in found["splits"].values())
    boxes = sum(len(picture.boxes) for picture in box_folders.PICTURES if picture.split == "train")
    assert found["counts"]["train"] == boxes == 4
    assert found["recipes"] and found["recipes"][0].startswith("dinov2_det data.path=")
    assert main(["data", str(tmp_path / "set"), "--limit", "1"]) == 0
    assert "boxes are counted in all images" in " ".join(capsys.readouterr().out.split())


def test_images_alone_are_shown_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    for number in range(3):
        folders.scene(number, size=(40 + number, 32))[0].save(tmp_path / f"flat/{number}.png")
    folders.turned(tmp_path / "flat/on its side.jpg", folders.scene(1)[0])
    found = told(capsys, tmp_path / "flat")
    assert (found["labels"], found["classes"], found["rotated"]) == ("images", [], 1)
    assert found["sizes"]["most"] == [42, 32] and found["formats"] == {"PNG, RGB": 3, "JPEG, RGB": 1}
    assert found["recipes"][0].startswith("dinov2_features data.path=")
    assert (tmp_path / "flat_data.png").is_file()


def test_classes_that_a_split_lacks_and_odd_masks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.pairs(tmp_path / "set/train/images", tmp_path / "set/train/masks", 3, classes=2)
    folders.pairs(tmp_path / "set/val/images", tmp_path / "set/val/masks", 3, classes=3, first=5)
    folders.grey(tmp_path / "set/train/masks/000", np.full(folders.SIZE[::-1], 255, np.uint8))
    (tmp_path / "set/labels.json").write_text('{"id2label": {"0": "ground", "1": "car", "2": "tree", "3": "sky"}}')
    said = "\n".join(told(capsys, tmp_path / "set")["problems"])
    assert "1 image with a mask that is all void, first train/images/000.jpg" in said
    assert "in validation but not in train: nothing teaches them: tree" in said and "in no split: sky" in said


def test_classes_and_depths_are_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, label in (("cat", 0), ("dog", 1), ("dog", 2)):
        (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
        folders.scene(label)[0].save(tmp_path / "animals" / name / f"{label}.png")
    found = told(capsys, tmp_path / "animals", "--limit", "1")
    assert (found["labels"], found["task"], found["counts"]) == ("classes", "classification", {"train": 3})
    assert [(one["name"], one["images"]["train"]) for one in found["classes"]] == [("dog", 2), ("cat", 1)]
    assert main(["init", str(tmp_path / "a.yaml"), "--data", str(tmp_path / "animals"), "--yes", "--no-measure"]) == 0
    assert load_recipe(str(tmp_path / "a.yaml")).task == "classification"
    capsys.readouterr()
    found = told(capsys, "shapes", "--task", "depths", "--limit", "2")
    assert (found["labels"], found["task"], found["classes"]) == ("depths", "depth", [])
    assert (tmp_path / "shapes_data.png").stat().st_size > 20_000


def test_what_is_wrong_with_some_files_of_a_set_is_a_problem_of_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        (tmp_path / "rooms/depth").mkdir(parents=True, exist_ok=True)
        (tmp_path / "rooms/images").mkdir(parents=True, exist_ok=True)
        folders.scene(number)[0].save(tmp_path / "rooms/images" / f"{number}.png")
        if number != 2:
            np.save(tmp_path / "rooms/depth" / f"{number}.npy", np.ones(folders.SIZE[::-1], np.float32))
    found = told(capsys, tmp_path / "rooms")
    assert found["task"] == "depth" and "train: 1 image without a label, first images/2.png" in found["problems"]
    lines = [f'{{"file_name": "{n}.png", "objects": {{"bbox": [], "category": []}}}}' for n in range(3)]
    (tmp_path / "rooms/images/metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "3.png", "objects": 1}']))
    assert main(["data", str(tmp_path / "rooms/images")]) == 2
    said = capsys.readouterr().err.splitlines()  # not also that masks, depth maps and classes are missing
    assert len(said) == 1 and "line 4: expected column 'objects' to hold a dict" in said[0]


def test_what_is_not_there_or_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.pairs(tmp_path / "set/images", tmp_path / "set/masks", 2)
    assert main(["data", str(tmp_path / "set"), "--task", "boxes"]) == 2
    assert "expected YOLO" in capsys.readouterr().err
    assert main(["data", str(tmp_path / "set"), "--output", "no/such/place.png"]) == 2
    assert "--output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["data", str(tmp_path / "set"), "--limit", "0"])
    assert error.value.code == 2


def test_what_to_do_next_keeps_the_labels_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_instances(tmp_path / "set")
    for task, named in (("boxes", ""), ("instances", " --task instance-segmentation")):
        assert main(["data", str(folder), "--task", task, "--limit", "1"]) == 0
        assert f"cankd init --data {folder}{named}\n" in capsys.readouterr().out
    words = ["init", str(tmp_path / "a.yaml"), "--data", str(folder), "--task", "instance-segmentation"]
    assert main([*words, "--yes", "--no-measure"]) == 0
    assert f"cankd data {folder} --task instance-segmentation\n" in capsys.readouterr().out


def test_tasks_have_one_name_and_their_labels_name_them_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_instances(tmp_path / "set")
    said = []
    for name in ("detection", "instance-segmentation", "instances"):
        assert main(["data", str(folder), "--task", name, "--limit", "1"]) == 0
        said.append(capsys.readouterr().out)
    assert ", for detection (also for segmentation, instance-segmentation: --task segmentation)\n" in said[0]
    assert said[1] == said[2] and ", for instance-segmentation (also for" in said[1] and "instances" not in said[1]
    assert all(name in " ".join(parser().format_help().split()) for name in TASKS)
    assert main(["data", str(folder), "--task", "instance"]) == 2
    assert "did you mean 'instance-segmentation'?" in capsys.readouterr().err
    assert main(["data", "shapes", "--task", "detection", "--limit", "1"]) == 0  # of objects whose masks are known
    assert "boxes (images that hold it)" in capsys.readouterr().out
