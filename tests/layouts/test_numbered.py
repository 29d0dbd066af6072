"""What is told of a set of images and masks: frames of films, a missing mask, a part of a stream, a slip in a mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cankd_hf.cli.data import next_steps
from cankd_hf.cli.looking import look_at, shape_lines
from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.holdout import by_clips, held_out, with_held_out
from cankd_hf.data.layouts import look
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

from . import box_folders
from .folders import pairs, scene


def test_frames_of_films_are_told_with_the_way_to_hold_whole_clips_out(tmp_path: Path) -> None:
    names = [f"images/{clip}_{number:06}.png" for clip in "abcd" for number in range(30, 780, 30)]
    said = with_held_out(DataConfig(path="x"), len(names), ["eval", "test"], "x", names)[1][1]
    assert "(a_000030.png, a_000060.png, ...)" in said
    assert said.endswith("data.train_split=train[:75] data.eval_split=train[75:90] data.test_split=train[90:]")
    found = by_clips(names, held_out("train", len(names), ["eval"], 0.22))  # the last clip
    assert found == {"train": "train[:75]", "eval": "train[75:]"}
    numbers = np.random.default_rng(0).choice(10**6, 200, replace=False)
    for others in (
        sorted(f"{n:06}.jpg" for n in numbers),
        names[:10],
        ["a.png"] * 50,
        [f"p{n}/x.png" for n in range(50)],
    ):
        assert by_clips(others, {"train": "train[:90%@0]", "eval": "train[90%:@0]"}) is None
    pairs(tmp_path / "set/images", tmp_path / "set/masks", 24)
    data = load_segmentation(DataConfig(path=str(tmp_path / "set"), crop_size=[16, 16], image_size=[32, 32]))
    assert any("frames of films" in text and "train[22:]" in text for text in data.facts["warnings"])
    assert len(data.train) == 22 and data.train.indices != [*range(22)]  # a run that says nothing
    seen = look_at(str(tmp_path / "set"), None, 9)  # what is written down
    assert (seen.settings["train_split"], seen.settings["eval_split"]) == ("train[:22]", "train[22:]")
    split, films = [note for note in seen.notes if "held out" in note]
    assert split.endswith("as with data.train_split=train[:22], data.eval_split=train[22:]")
    assert films.endswith("at random: data.train_split=train[:90%@0] data.eval_split=train[90%:@0]")


def test_a_missing_mask_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs(tmp_path / "set/images", tmp_path / "set/masks", 5)
    next((tmp_path / "set/masks").iterdir()).unlink()
    load_segmentation(DataConfig(path=str(tmp_path / "set"), crop_size=[16, 16], image_size=[32, 32]))
    assert caplog.text.count("mask and are left out") == 1 and "images without a mask" not in caplog.text


def test_a_part_of_a_stream_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path / "set/images", tmp_path / "set/masks", 5)
    config = DataConfig(path=str(tmp_path / "set"), streaming=True, train_split="train[:50%]", eval_split=None)
    with pytest.raises(InputError, match="data.train_split: expected a whole split, as no part of a stream"):
        load_segmentation(config)


@pytest.mark.parametrize(
    ("made", "given", "kind"),
    [
        (lambda root: pairs(root / "images/train", root / "masks/train", 3), "images/train", "masks"),
        (lambda root: pairs(root / "train/image", root / "train/label", 3), "train/image", "masks"),
        (box_folders.yolo, "images", "boxes"),
        (lambda root: voc(root), "JPEGImages", "boxes"),
        (box_folders.coco, "train2017", "boxes"),
        (lambda root: depths(root), "rgb", "depths"),
    ],
    ids=["images/train", "train/images", "yolo", "voc", "coco", "depth"],
)
def test_a_part_of_a_set_leads_to_the_whole(
    made: Callable[[Path], None], given: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other/images").mkdir(parents=True)
    made(tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    for path, whole in ((str(tmp_path / "set" / given), str(tmp_path / "set")), (given, ".")):
        seen = look_at(path, None, 1)
        assert (
            seen.whole == whole and f"a part of a set: data.path={whole} reads images with their {kind}" in seen.notes
        )
        assert next_steps(seen)[1:] == [
            f"  cankd data {whole}",
            f"  cankd data {path} --task features   # to learn from these images alone",
        ]
    with pytest.raises(InputError, match=f"give data.path={tmp_path / 'set'}, (where|which is read as) "):
        look(tmp_path / "set" / given, kind)
    alone = look_at(path, "images", 1)
    assert alone.whole is None and next_steps(alone)[1] == f"  cankd init --data {given}"
    scene(1)[0].save(tmp_path / "other/images/1.png")  # beside which there is nothing
    assert look_at(str(tmp_path / "other/images"), None, 1).whole is None


def voc(root: Path) -> None:
    """Pascal VOC without the folders above."""
    box_folders.voc(root.with_name("devkit"))
    root.with_name("devkit").joinpath("VOCdevkit/VOC2012").rename(root)


def depths(root: Path) -> None:
    """Images beside depth maps."""
    for name in ("rgb", "depth"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        scene(number)[0].save(root / f"rgb/{number}.png")
        np.save(root / f"depth/{number}.npy", np.ones((32, 40), np.float32))


def test_a_class_of_one_image_is_a_problem_where_classes_are_counted(tmp_path: Path) -> None:
    pairs(tmp_path / "set/images", tmp_path / "set/masks", 12)
    part = look_at(str(tmp_path / "set/images"), None, 2)  # half of a set says what it is a half of
    assert part.notes[0] == f"a part of a set: data.path={tmp_path / 'set'} reads images with their masks"
    assert look_at(str(tmp_path / "set"), None, 50).problems == []
    file = sorted((tmp_path / "set/masks").iterdir())[3]
    mask = np.asarray(Image.open(file)).copy()
    mask[:2] = 37
    Image.fromarray(mask).save(file)
    said = look_at(str(tmp_path / "set"), None, 50).problems
    assert said == [f"class_3 (value 37) is in one image alone, images/{file.stem}.jpg: a slip in its labels?"]


def test_labels_that_are_not_read_or_do_not_fit_are_told(tmp_path: Path) -> None:
    picture, _ = scene(0)
    for name in ("list", "voc"):
        (tmp_path / name).mkdir()
        for number in range(3):
            picture.save(tmp_path / name / f"{number}.jpg")
    (tmp_path / "list/annotations.json").write_text("[1, 2, 3]")
    assert "1 files that could hold labels are of no layout" in look_at(str(tmp_path / "list"), None, 9).notes[0]
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    size = "<size><width>400</width><height>320</height></size>"
    for number in range(3):
        text = f"<annotation>{size}<object><name>cat</name>{box}</object></annotation>"
        (tmp_path / f"voc/{number}.xml").write_text(text)
    said = look_at(str(tmp_path / "voc"), None, 9).problems
    assert len(said) == 1 and said[0].startswith(
        "train: 3 images with boxes that look wrong, first 0.jpg: the metadata"
    )
    pairs(tmp_path / "set/images", tmp_path / "set/masks", 3)
    (tmp_path / "set/labels.json").write_text("[]")
    with pytest.raises(InputError, match="expected the names of the classes, got none"):
        look_at(str(tmp_path / "set"), None, 9)


def test_frames_of_one_file_and_masks_that_lose_are_told(tmp_path: Path) -> None:
    pairs(tmp_path / "set/images", tmp_path / "set/masks", 6)
    picture, labels = scene(0)
    picture.save(tmp_path / "set/images/film.gif", save_all=True, append_images=[scene(1)[0]])
    Image.fromarray((labels > 0).astype(np.uint8) * 255).save(tmp_path / "set/masks/film.jpg")
    seen = look_at(str(tmp_path / "set"), None, 9)
    assert "1 of several frames or pages, of which the first is read" in shape_lines(seen)
    assert any("1 masks are JPEG files, whose compression changes values along edges" in note for note in seen.notes)
