"""Sets of the size of COCO: read piece by piece, kept in arrays, checked in part, and honest about which part."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cankd_hf.benchmark import main
from cankd_hf.benchmark.large import write_coco
from cankd_hf.config.data import DataConfig
from cankd_hf.data.common import json_stream
from cankd_hf.data.common.decode import Decoder
from cankd_hf.data.common.json_stream import NotPlain
from cankd_hf.data.common.rows import Rows
from cankd_hf.data.common.targets import Mask
from cankd_hf.data.detection import coco
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.detection.objects import read_annotation
from cankd_hf.data.detection.table import AnnotationTable
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

Make = Callable[..., Path]
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]


def images(count: int) -> list[dict[str, Any]]:
    return [{"id": number, "file_name": f"{number}.png", "width": 30, "height": 20} for number in range(count)]


def boxes(owners: list[Any], **changes: Any) -> list[dict[str, Any]]:
    usual = {"category_id": 9, "bbox": [1, 2.5, 6, 5], "area": 21.5, "iscrowd": 0, "segmentation": [[1.5, 2]]}
    return [{"id": number, "image_id": owner, **usual, **changes} for number, owner in enumerate(owners)]


def outcome(root: Path, text: str, skip: bool = False) -> Any:
    """What a COCO json gives: names, annotations and warnings; or its problems."""
    file = root / "train.json"
    file.write_bytes(text.encode())
    try:
        found = coco.read_coco(root, "train", file, skip)
    except InputError as error:
        return error.problems
    notes = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(note).items()}
        for note in found.annotations
    ]
    return [row.name for row in found.rows], notes, found.categories, found.warnings


FILES: dict[str, Any] = {
    "usual": {
        "info": {"a": [1, {}]},
        "images": images(4),
        "annotations": boxes([2, 0, 2, 3]),
        "categories": CATEGORIES,
    },
    "boxes first": {"annotations": boxes([2, 0, 2, 3]), "categories": CATEGORIES, "images": images(4)},
    "no boxes": {"images": images(2), "categories": CATEGORIES},
    "nothing": {"images": [], "annotations": [], "categories": CATEGORIES},
    "a list missing": {"images": images(2), "annotations": []},
    "a list of another kind": {"images": {"0": 1}, "annotations": [], "categories": CATEGORIES},
    "an entry of another kind": {"images": images(2), "annotations": [7], "categories": CATEGORIES},
    "names": {
        "images": [{"id": 0, "file_name": "./ä//b.png"}, {"id": "x", "file_name": "c.png", "width": "7", "height": 2}],
        "annotations": boxes([0, "x", 0]),
        "categories": CATEGORIES,
    },
    "bad names": {
        "images": [{"id": 0, "file_name": "../a.png"}, {"id": 1, "file_name": ""}, {"id": 2, "file_name": 5}],
        "categories": CATEGORIES,
    },
    "strangers": {"images": images(2), "annotations": boxes([7, 0, "q"]), "categories": CATEGORIES},
    "ids twice": {"images": [*images(2), *images(1)], "annotations": boxes([0]), "categories": CATEGORIES},
    "box ids twice": {"images": images(1), "annotations": [*boxes([0, 0]), *boxes([0])], "categories": CATEGORIES},
}
for _key, _value in {
    "bbox": [
        [1, 2, 0, 4],
        [1, 2, -1, 4],
        [1, 2, 3],
        "1234",
        [1, True, 3, 4],
        [1, float("nan"), 3, 4],
        None,
        [1e300] * 4,
    ],
    "category_id": [4, "9", 9.0, None, 2**70],
    "iscrowd": [1, 2, None, True],
    "area": [0, -1, "x", 2**70],
    "id": [None, 2**70, "a", [1]],
    "box": [[1, 2, 3, 4]],
    "category": [3],
}.items():
    for _number, _one in enumerate(_value):
        _odd = boxes([0], **{_key: _one})
        FILES[f"{_key} {_number}"] = {
            "images": images(2),
            "annotations": [*boxes([0, 1]), *_odd, *boxes([0])],
            "categories": CATEGORIES,
        }


@pytest.mark.parametrize("name", FILES)
def test_reading_in_pieces_is_reading_the_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(*_: Any) -> Any:
        raise NotPlain

    for indent, skip in ((None, False), (1, True)):
        text = json.dumps(FILES[name], indent=indent)
        found = []
        for piece in (1, 50, 2**20):
            monkeypatch.setattr(json_stream, "PIECE", piece)
            found.append(outcome(tmp_path, text, skip))
        with monkeypatch.context() as patched:
            patched.setattr(coco, "elements", whole)
            assert str([outcome(tmp_path, text, skip)] * 3) == str(found)  # as text: nan is not equal to itself


def test_a_damaged_file_is_told_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, draw = json.dumps(FILES["usual"]), random.Random(0)
    monkeypatch.setattr(json_stream, "PIECE", 64)
    for _ in range(60):
        place = draw.randrange(len(text))
        damaged = text[:place] + draw.choice(["", "{", "]", ",", '"', "x"]) + text[place + draw.randrange(2) :]
        try:
            json.loads(damaged)
        except ValueError:
            assert any("not valid json" in problem for problem in outcome(tmp_path, damaged))
    assert any("not valid json" in problem for problem in outcome(tmp_path, text[:-1]))
    assert any("not valid json" in problem for problem in outcome(tmp_path, text + "{}"))


def test_memory_is_that_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "PIECE", 2**16)
    outline = [[round(number * 1.37, 2) for number in range(500)]]
    content = {"images": images(200), "annotations": boxes([*range(200)] * 6, segmentation=outline)}
    (tmp_path / "train.json").write_text(json.dumps(content | {"categories": CATEGORIES}))
    tracemalloc.start()
    found = coco.read_coco(tmp_path, "train", tmp_path / "train.json", skip=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.annotations) == 200 and len(found.annotations[7].boxes) == 6
    assert peak < (tmp_path / "train.json").stat().st_size / 4


def test_rows_and_annotations_are_sequences(tmp_path: Path) -> None:
    rows = pickle.loads(pickle.dumps(Rows(tmp_path, ["a/ä.png", "b.png"], ["", "m.png"])))
    assert [row.name for row in rows] == ["a/ä.png", "b.png"] and rows.bare() == [0] and rows[0].mask is None
    assert rows[-1].mask == tmp_path / "m.png" and rows[0].image == tmp_path / "a/ä.png" and len(rows[:1]) == 1
    assert Rows(tmp_path, ["a.png"]).bare() == [0]
    with pytest.raises(IndexError):
        rows[2]
    values = [{"bbox": [[1, 2, 3, 4]] * n, "category": [0] * n} for n in range(3)] + [
        {"bbox": [[1, 2, 0, 4]], "category": [0]}
    ]
    notes = [read_annotation(value, "a", {0: 0}, image_id=n, size=(9, n + 2)) for n, value in enumerate(values)]
    table = pickle.loads(pickle.dumps(AnnotationTable.of(notes)))
    assert [str(note) for note in table] == [str(note) for note in notes]
    assert table.known([0, 1, 2]).labels == {0} and table.known([0, 3]).labels == frozenset()
    assert table.known(range(4)).suspects == [1] and table.known([2]).sizes == [((4, 9), 2)]  # 1 has too little room


def coco_set(root: Path, count: int = 40) -> Path:
    """A set of one split with small images."""
    (root / "train").mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (30, 20), (number, 9, 9)).save(root / "train" / f"{number}.png")
    content = {"images": images(count), "annotations": boxes(list(range(count))), "categories": CATEGORIES[1:]}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are decoded from now on."""
    seen: list[str] = []
    image = Decoder.image
    monkeypatch.setattr(Decoder, "image", lambda self, data, name: seen.append(name) or image(self, data, name))
    return seen


def test_a_part_is_decoded_and_all_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = coco_set(tmp_path), decoded(monkeypatch)
    config = DataConfig(path=str(root), eval_split=None, check=5)
    data = load_detection(config, splits=("train",))
    assert len(seen) == data.facts["checked"] == 5 and {"train/0.png", "train/39.png"} <= {*seen}
    (root / "train" / "12.png").write_bytes(b"no image")  # not looked at: met when it is used
    assert load_detection(config, splits=("train",)).facts["checked"] == 5
    (root / "train" / "13.png").unlink()
    with pytest.raises(InputError, match=r"^train/13\.png: the file does not exist\ndata\.on_error=skip"):
        load_detection(config, splits=("train",))
    skipping = load_detection(DataConfig(path=str(root), eval_split=None, check=5, on_error="skip"), splits=("train",))
    assert len(skipping.train) == 39 and list(skipping.facts["skipped"]["files"]) == ["train/13.png"]
    with pytest.raises(InputError, match=r"12\.png: expected an image that decodes"):
        load_detection(DataConfig(path=str(root), eval_split=None, check="all"), splits=("train",))


def test_boxes_that_do_not_fit_the_stated_size_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = coco_set(tmp_path)
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][17]["bbox"] = [100, 5, 6, 5]
    content["images"][23] |= {"width": 3, "height": 200}  # the thinnest one, as the json says
    file.write_text(json.dumps(content))
    seen = decoded(monkeypatch)
    with pytest.raises(InputError, match=r"train/17\.png box 0 .* outside"):
        load_detection(DataConfig(path=str(root), eval_split=None, check=2), splits=("train",))
    assert {*seen} == {"train/0.png", "train/39.png", "train/17.png", "train/23.png"} - {*seen[4:]}


def test_classes_of_boxes_are_known_without_decoding(tmp_path: Path) -> None:
    root = coco_set(tmp_path)
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["categories"] = CATEGORIES
    content["annotations"][17]["category_id"] = 3
    file.write_text(json.dumps(content))
    config = DataConfig(path=str(root), eval_split=None, check=2)
    assert load_detection(config, splits=("train",)).facts["warnings"] == []


def test_a_folder_of_masks_is_looked_at_in_part(make_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen = make_folder(train=12), decoded(monkeypatch)
    config = DataConfig(path=str(root), check=3)
    assert load_segmentation(config).facts["checked"] == len(seen) == 3 + 2
    (root / "train" / "masks" / "4.png").unlink()
    with pytest.raises(InputError, match=r"train/masks/4\.png: the file does not exist"):
        load_segmentation(config)


def test_a_summary_keeps_no_pixels() -> None:
    mask = Mask(torch.zeros(4, 4, dtype=torch.uint8))
    pixels, summary = weakref.ref(mask.value), mask.summary()
    del mask
    assert pixels() is None and summary.classes == {0}


def test_the_benchmark_opens_a_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--coco", "30", "--check", "4"]) == 0
    said = capsys.readouterr().out
    assert "30, 218" in said and "GiB" in said and "images decoded" in said
    assert main(["data", "--coco", "0"]) == 2 and "--coco" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_thousand_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write_coco(tmp_path, 20_000)
    seen = decoded(monkeypatch)
    tracemalloc.start()
    data = load_detection(DataConfig(path=str(tmp_path), eval_split="val"), splits=("train", "eval"))
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) == 20_000 and len(seen) == 1000 + 833 == data.facts["checked"]
    assert peak < size / 1.5 and now < size / 3
