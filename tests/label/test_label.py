"""`cankd label`: what it writes, that it trains, and that a person's corrections and held-out pictures are safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as DatasetImage
from PIL import Image

from cankd_hf import label
from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.soft import SoftMask, levels_of, probabilities, read_levels, to_png
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError
from cankd_hf.label.teacher import LabelTeacher, open_teacher
from cankd_hf.tasks.detection_labels import BoxLabelling
from cankd_hf.tasks.labelling import Choices
from cankd_hf.tasks.segmentation_labels import MaskLabelling
from tests.label.conftest import NAMES, save_images
from tests.training.detection_folders import write_boxes

NO_SPLITS: dict[str, Any] = {"eval_split": None, "test_split": None}


def lines_of(out: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    lines = (out / split / "metadata.jsonl").read_text().splitlines()
    return {line["file_name"]: line for line in map(json.loads, lines)}


def write_lines(out: Path, lines: list[dict[str, Any]]) -> None:
    (out / "train" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def mask_of(out: Path, name: str) -> np.ndarray:
    return np.array(Image.open(out / "train" / "masks" / name))


def run(*words: object) -> None:
    sheet = [] if "--sheet" in words else ["--sheet", "1"]  # drawing takes longest
    assert label.main([*map(str, words), *sheet]) == 0


def counted(monkeypatch: pytest.MonkeyPatch, after: int | None = None) -> list[int]:
    """The number of images of each call of the teacher from now on; with `after` the one after it is interrupted."""
    calls: list[int] = []
    asked = LabelTeacher.__call__

    def call(self: LabelTeacher, images: Any, device: torch.device) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(len(images))
        return asked(self, images, device)

    monkeypatch.setattr(LabelTeacher, "__call__", call)
    return calls


def test_masks_are_the_teachers_and_train(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    """Each mask from its definition: the likeliest class of the resized logits, void below the threshold."""
    out = tmp_path / "out"
    run(
        segmenter,
        photos,
        "--output",
        out,
        "--threshold",
        "0.6",
        "green=0.3",
        "--keep",
        "0",
        "--batch-size",
        "4",
        "--sheet",
        "3",
    )
    teacher = open_teacher(str(segmenter), None, None, None)
    voids = 0
    for number in range(6):
        pixels = torch.from_numpy(np.array(Image.open(photos / f"{number}.png"))).permute(2, 0, 1)
        images = (pixels[None].float() / 255 - 0.5) / 0.25
        logits = teacher.model(pixel_values=images).logits
        sure, found = torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear").softmax(1).max(1)
        least = torch.tensor([0.6, 0.3, 0.6])[found]
        assert ((sure - least).abs() > 1e-4).all()
        expected = torch.where(sure >= least, found, 255)[0].numpy()
        voids += (expected == 255).sum()
        assert (mask_of(out, f"{number}.png") == expected).all()
        assert (out / f"train/images/{number}.png").read_bytes() == (photos / f"{number}.png").read_bytes()
    assert voids > 0
    report = json.loads((out / "label.json").read_text())
    assert report["images"]["labelled"] == 6 and report["teacher"]["fingerprint"] == teacher.fingerprint()
    assert sum(report["confidence"]) == 6 * 64 * 96 and report["classes"]["green"]["threshold"] == 0.3
    assert (out / "contact.png").is_file() and "metadata" not in (out / "contact.html").read_text()
    data = load_segmentation(DataConfig(path=str(out), image_size=[64, 96], **NO_SPLITS))
    assert data.id2label == NAMES and data.facts["prepaid"]["pseudo-labels"] == report["cost"]
    assert report["cost"]["cpu_seconds"] > 0
    assert data.train[0]["labels"].shape == (64, 96)


def test_a_class_keeps_its_share(segmenter: Path) -> None:
    """Of two classes, one is never as sure as the threshold of all: half of its pixels are kept, not none."""
    labelling = MaskLabelling({0: "sure", 1: "unsure"}, Choices(keep=0.5))
    sure = torch.linspace(0.5, 0.7, 1000)
    logits = torch.zeros(1, 2, 20, 100)
    logits[0, 0, :10] = 9.0
    logits[0, 1, 10:] = (sure / (1 - sure)).log().view(10, 100)
    labelling.look({"logits": logits}, [(20, 100)])
    first, second = labelling.thresholds
    assert first == 0.95 and abs(second - 0.6) < 0.002
    fresh = MaskLabelling({0: "sure", 1: "unsure"}, Choices(keep=0.5))
    fresh.take(labelling.seen_so_far())
    assert fresh.thresholds == [first, second]
    assert MaskLabelling({0: "sure", 1: "unsure"}, Choices(keep=0)).thresholds == [0.95, 0.95]


def test_soft_labels_are_drawn_from_what_the_teacher_said() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 8, 12) * 4
    exact = logits.softmax(0)
    levels = read_levels(to_png(levels_of(logits)), "soft", 5, 10_000)
    stored = probabilities(levels)
    divergence = (exact * (exact / stored).log()).sum(0)
    assert divergence.mean() < 7e-5 * 10 and divergence.max() < 1e-3
    labels = torch.zeros(8, 12, dtype=torch.uint8)
    mine = torch.zeros(8, 12, dtype=torch.bool)
    mine[:, 6:] = True
    target = SoftMask(labels, levels, mine)
    draws = torch.stack([target.drawn() for _ in range(4000)])
    assert (draws[:, :, :6] == 0).all(), "what a person wrote is never drawn"
    frequency = torch.stack([(draws == number).float().mean(0) for number in range(5)])[:, :, 6:]
    assert (frequency - stored[:, :, 6:]).abs().max() < 0.04
    assert draws.dtype == torch.uint8 and target.summary().classes == {0}


def test_soft_sets_train_and_a_corrected_pixel_is_final(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(segmenter, photos, "--output", out, "--soft")
    config = DataConfig(path=str(out), image_size=[64, 96], scale=[1, 1], flip=0, **NO_SPLITS)
    data = load_segmentation(config)
    masks = torch.from_numpy(mask_of(out, "0.png").astype(np.int64))
    assert masks.max() <= 2, "soft masks have no threshold"
    torch.manual_seed(0)
    first, second = (data.train[0]["labels"] for _ in range(2))
    assert (first != second).any() and (first != masks).any()
    sample = data.train.raw(0)
    assert isinstance(sample.target, SoftMask) and sample.target.teachers.float().mean() > 0.999
    edited = (mask_of(out, "0.png") + 1) % 3
    edited[:4] = 255
    Image.fromarray(edited).save(out / "train/masks/0.png")
    for _ in range(3):
        drawn = load_segmentation(config).train[0]["labels"]
        assert (drawn.numpy()[4:] == edited[4:]).all() and (drawn[:4] == 255).all()
    hard = load_segmentation(DataConfig(path=str(out), image_size=[64, 96], soft_targets=False, **NO_SPLITS))
    assert not isinstance(hard.train.raw(1).target, SoftMask) and not hard.facts["warnings"][1:]
    soft = load_segmentation(DataConfig(path=str(out), image_size=[64, 96], **NO_SPLITS))
    views = [SeededDataset(one.train, seed=3) for one in (hard, soft)]
    of_masks, of_soft = (view[1] for view in views)
    assert (of_masks["pixel_values"] == of_soft["pixel_values"]).all(), "crops and flips are those of hard labels"
    assert (of_masks["labels"] != of_soft["labels"]).any() and (of_soft["labels"] == views[1][1]["labels"]).all()


def test_what_a_person_corrected_stays(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    """A changed mask, a changed, a removed and an added line, and class names, through a call with other choices."""
    out, words = tmp_path / "out", [segmenter, photos, "--output", tmp_path / "out", "--keep", "0"]
    run(*words, "--threshold", "0.4")
    before = {name: mask_of(out, name) for name in ("0.png", "1.png")}
    corrected = np.full_like(before["0.png"], 2)
    Image.fromarray(corrected).save(out / "train/masks/0.png")
    lines = lines_of(out)
    lines["images/3.png"]["note"] = "looked at"
    del lines["images/4.png"]
    shutil.copy(photos / "5.png", out / "train/images/mine.png")
    shutil.copy(out / "train/masks/5.png", out / "train/masks/mine.png")
    write_lines(out, [*lines.values(), {"file_name": "images/mine.png", "mask_file_name": "masks/mine.png"}])
    names = json.loads((out / "labels.json").read_text())
    names["id2label"]["0"] = names["id2label"]["0"].upper()
    (out / "labels.json").write_text(json.dumps(names))
    for _ in range(2):
        run(*words, "--threshold", "0.9")
        assert (mask_of(out, "0.png") == corrected).all()
        assert (mask_of(out, "1.png") != before["1.png"]).any(), "all others are written anew"
        now = lines_of(out)
        assert now["images/3.png"]["note"] == "looked at" and "images/4.png" not in now and "images/mine.png" in now
        assert json.loads((out / "labels.json").read_text())["id2label"]["0"] == "RED"
        images = json.loads((out / "label.json").read_text())["images"]
        assert images["corrected"] == 2 and images["removed"] == 1
    load_segmentation(DataConfig(path=str(out), image_size=[64, 96], **NO_SPLITS))


def test_it_goes_on_where_it_was_interrupted(
    segmenter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [segmenter, photos, "--batch-size", "2", "--threshold", "0.5", "--keep", "0"]
    run(*words, "--output", tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        assert sum(counted(patch, after=2)) == 0
        assert label.main([*map(str, words), "--output", str(out)]) == 130
    with (out / ".label/journal-0.jsonl").open("a") as journal:
        journal.write('{"source": "5.png", "half a li')  # of a kill in the middle of a write
    calls = counted(monkeypatch)
    run(*words, "--output", out)
    assert calls == [2]
    for file in ("train/metadata.jsonl", "labels.json", *(f"train/masks/{number}.png" for number in range(6))):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    run(*words, "--output", out)
    assert calls == [2], "nothing is left to do"
    (out / "train/masks/2.png").unlink()
    run(*words, "--output", out)
    assert calls == [2, 1]


def test_held_out_pictures_are_left_out_and_refused(
    segmenter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same picture under another name and as another format, by --not-in; then one that got in all the same."""
    other, out = tmp_path / "other", tmp_path / "out"
    save_images(other / "test", 2, seed=7)
    save_images(other / "train", 2, seed=8)
    Image.open(photos / "2.png").save(other / "test" / "renamed.tif")
    run(segmenter, photos, "--output", out, "--not-in", other)
    assert "1 left out" in capsys.readouterr().out and set(lines_of(out)) == {
        f"images/{n}.png" for n in (0, 1, 3, 4, 5)
    }
    shutil.copytree(out / "train", out / "val")
    config = DataConfig(path=str(out), image_size=[64, 96], check="none")
    with pytest.raises(InputError, match=r"got 5; label again(?s:.*)train/images/0.png = val/images/0.png"):
        load_segmentation(config)
    shutil.rmtree(out / "val")
    run(segmenter, photos, "--output", out)
    assert len(lines_of(out)) == 6, "one that is not held out any more is labelled"
    run(segmenter, photos, "--output", out, "--not-in", other)
    assert "images/2.png" not in lines_of(out) and not (out / "train/images/2.png").exists()


def test_boxes_follow_labelled_priors(detector: Path, tmp_path: Path) -> None:
    """As many boxes an image are kept as there are in labelled ones; with them the set is complete and trains."""
    labelled, out = write_boxes(tmp_path / "labelled"), tmp_path / "out"
    photos = save_images(tmp_path / "photos", 6)
    shutil.copy(labelled / "test/0.png", photos / "seen.png")
    run(detector, photos, "--labelled", labelled, "--complete", "--output", out)
    lines = lines_of(out)
    own = [line for name, line in lines.items() if not name.startswith("labelled/")]
    assert len(own) == 6 and len(lines) == 6 + 8
    rows = [one for line in own for one in zip(line["objects"]["category"], line["objects"]["score"], strict=True)]
    rest = [
        one for line in own for one in zip(line["candidates"]["category"], line["candidates"]["score"], strict=True)
    ]
    truth = [
        kind
        for name, line in lines.items()
        if name not in {one["file_name"] for one in own}
        for kind in line["objects"]["category"]
    ]
    report = json.loads((out / "label.json").read_text())
    for kind, name in NAMES.items():
        expected = round(6 * truth.count(kind) / 8)
        assert report["classes"][name]["prior"] == truth.count(kind) / 8
        scores = sorted((score for of, score in rows + rest if of == kind), reverse=True)
        kept = [score for of, score in rows if of == kind]
        assert len(kept) >= min(expected, len(scores)) and all(
            score >= report["classes"][name]["threshold"] for score in kept
        )
        if expected and len(scores) > expected:
            assert min(kept) == pytest.approx(scores[expected - 1])
    data = load_detection(DataConfig(path=str(out), image_size=[64, 96], test_split="test"))
    assert len(data.train) == 14 and len(data.eval) == 3 and len(data.test) == 3
    assert "seen.png" in report["images"]["left_out"]


def test_thresholds_of_boxes() -> None:
    facts = [{"bbox": [[0, 0, 9, 9]] * 4, "category": [0, 0, 0, 1], "score": [0.9, 0.8, 0.2, 0.04]}] * 10
    made = BoxLabelling({0: "a", 1: "b"}, Choices(), np.array([20.0, 30.0]), images=20).summary(facts)
    assert made.thresholds == [0.9, 0.05] and made.classes["a"]["share"] == 1 and "b: kept 0" in made.warnings[0]
    many = BoxLabelling({0: "a", 1: "b"}, Choices(), np.array([60.0, 0.0]), images=20).summary(facts)
    assert many.thresholds[0] == 0.2 and many.warnings[0].startswith("a: as many boxes")
    fifth = BoxLabelling({0: "a", 1: "b"}, Choices(keep=0.2), np.array([20.0, 30.0]), images=20).summary(facts)
    assert fifth.classes["a"]["threshold"] == 0.9
    assert BoxLabelling({0: "a", 1: "b"}, Choices()).summary(facts).thresholds == [0.5, 0.5]
    assert BoxLabelling({0: "a", 1: "b"}, Choices(0.7, {"b": 0.1})).summary(facts).thresholds == [0.7, 0.1]


@pytest.mark.parametrize("words", [("shapes", "data.generated={train: 3, size: 64}"), ("parquet",), ("copies",)])
def test_sets_of_every_kind(words: tuple[str, ...], segmenter: Path, tmp_path: Path) -> None:
    """Generated images, a table, and a folder whose files share names but not folders or endings."""
    folder = words[0] if words[0] == "shapes" else str(tmp_path / words[0])
    if words[0] == "parquet":
        files = [{"bytes": file.read_bytes(), "path": None} for file in save_images(tmp_path / "files", 3).iterdir()]
        table = Dataset.from_dict({"image": files}).cast_column("image", Features(image=DatasetImage())["image"])
        Path(folder).mkdir()
        table.to_parquet(f"{folder}/train.parquet")
    elif words[0] == "copies":
        save_images(tmp_path / "copies/a", 1)
        shutil.copytree(tmp_path / "copies/a", tmp_path / "copies/b")
        Image.open(tmp_path / "copies/a/0.png").save(tmp_path / "copies/a/0.bmp")
    out = tmp_path / "out"
    run(segmenter, folder, *words[1:], "--output", out, "--link")
    assert len(lines_of(out)) == 3 and len(list((out / "train/masks").iterdir())) == 3
    assert words[0] != "copies" or (out / "train/images/a__0__png.png").samefile(tmp_path / "copies/a/0.png")
    assert len(load_segmentation(DataConfig(path=str(out), image_size=[64, 64], **NO_SPLITS)).train) == 3


def test_rare_classes_that_vanish_are_warned_of(segmenter: Path, photos: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled/train"
    save_images(labelled / "images", 1, seed=3)
    (labelled / "masks").mkdir()
    Image.fromarray(np.repeat([0, 1, 2], 32 * 64).reshape(96, 64).T.astype(np.uint8)).save(labelled / "masks/0.png")
    (labelled / "metadata.jsonl").write_text('{"file_name": "images/0.png", "mask_file_name": "masks/0.png"}')
    (labelled.parent / "labels.json").write_text(json.dumps({"id2label": {str(k): v for k, v in NAMES.items()}}))
    out = tmp_path / "out"
    run(segmenter, photos, "--labelled", labelled.parent, "--threshold", "0", "green=1", "--output", out)
    report = json.loads((out / "label.json").read_text())
    assert report["classes"]["green"]["prior"] == pytest.approx(1 / 3)
    assert any(said.startswith("green: kept") for said in report["warnings"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "high"], "--threshold: expected a number from 0 to 1"),
        (["--threshold", "grey=0.5"], "--threshold grey: expected a class of the teacher (blue, green, red)"),
        (["--threshold", "0.5", "0.6"], "--threshold: expected one number for all classes"),
        (["--complete"], "--complete: expected --labelled SET"),
        (["--keep", "2"], "--keep: expected a share from 0 to 1"),
        (["--not-in", "nowhere"], "--not-in nowhere: data.path"),
        (["--split", "night"], "--split: expected a split of"),
        (["--batch-size", "0"], "--batch-size: expected at least 1"),
        (["--weights", "w.pth"], "--weights: expected torchvision/NAME"),
        (["data.streaming=true"], "data.streaming: expected false"),
        (["data.flap=1"], "data.flap (command line): unknown key"),
    ],
)
def test_bad_options_are_told_in_one_line(
    words: list[str], said: str, segmenter: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label.main([str(segmenter), str(photos), "--output", str(tmp_path / "out"), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {said}"), lines


def test_other_folders_are_left_alone(
    segmenter: Path, detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert label.main([str(segmenter), str(photos), "--output", str(photos)]) == 2
    assert "expected a folder outside of" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert label.main([str(segmenter), str(photos), "--output", str(tmp_path / "mine")]) == 2
    assert "expected an empty folder" in capsys.readouterr().err
    run(segmenter, photos, "--output", out)
    assert label.main([str(segmenter), str(save_images(tmp_path / "b", 1)), "--output", str(out)]) == 2
    assert "holds labels of other images" in capsys.readouterr().err
    assert label.main([str(detector), str(photos), "--soft", "--output", str(tmp_path / "c")]) == 2
    assert "--soft: expected a teacher of masks" in capsys.readouterr().err
    (photos / "1.png").write_bytes(b"broken")
    assert label.main([str(segmenter), str(photos), "--output", str(tmp_path / "d")]) == 2
    assert capsys.readouterr().err.startswith("error: 1.png: expected an image that decodes")
    (out / "train/metadata.jsonl").write_text("[]\n")
    assert label.main([str(segmenter), str(photos), "--output", str(out), "data.on_error=skip"]) == 2
    assert "metadata.jsonl line 1: expected a JSON object" in capsys.readouterr().err
    run(segmenter, photos, "--output", tmp_path / "d", "data.on_error=skip")
    assert len(lines_of(tmp_path / "d")) == 5
