"""Images with one class each: folders by class, metadata and tables; scores as written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from cankd_hf.config.data import DataConfig
from cankd_hf.data.classification.load import load_classification
from cankd_hf.data.classification.transforms import classification_collate
from cankd_hf.data.layouts import look
from cankd_hf.errors import InputError
from cankd_hf.metrics.classification import class_rows, class_scores, confusion_of, probabilities


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.effect_noise((12, 10), 90).convert("RGB").save(path)


def by_class(root: Path, splits: tuple[str, ...] = ("train/", "val/")) -> Path:
    for split in splits:
        for name, count in (("dog", 2), ("cat", 3)):
            for number in range(count):
                photo(root / f"{split}{name}/{number}.png")
    return root


def test_folders_by_class_are_found(tmp_path: Path) -> None:
    by_class(tmp_path)
    assert look(tmp_path).layout == "a folder of images for each class"
    data = load_classification(DataConfig(path=str(tmp_path)))
    assert data.id2label == {0: "cat", 1: "dog"} and (len(data.train), len(data.eval)) == (5, 5)
    assert [int(item["labels"]) for item in data.eval] == [0, 0, 0, 1, 1] and data.train.name(4) == "train/dog/1.png"
    assert not data.facts["warnings"]
    photo(tmp_path / "train/stray.png")
    (told,) = load_classification(DataConfig(path=str(tmp_path))).facts["warnings"]
    assert told == "1 images lie in no class's folder and are left out, first train/stray.png"
    (tmp_path / "labels.json").write_text(json.dumps({"0": "dog", "1": "cat"}))
    assert [int(item["labels"]) for item in load_classification(DataConfig(path=str(tmp_path))).eval] == [
        1,
        1,
        1,
        0,
        0,
    ]
    (tmp_path / "labels.json").write_text(json.dumps({"0": "dog", "1": "bird"}))
    with pytest.raises(InputError, match=r"data\.labels: expected the names of the folders, got none for cat"):
        load_classification(DataConfig(path=str(tmp_path)))


def test_a_class_that_training_lacks_is_told(tmp_path: Path) -> None:
    by_class(tmp_path)
    photo(tmp_path / "val/emu/0.png")
    with pytest.raises(InputError, match=r"validation/emu: expected a class of the training images \(cat, dog"):
        load_classification(DataConfig(path=str(tmp_path)))


def test_without_splits_a_part_is_held_out(tmp_path: Path) -> None:
    by_class(tmp_path, ("",))
    data = load_classification(DataConfig(path=str(tmp_path)))
    assert len(data.train) + len(data.eval) == 5 and len(data.eval) >= 1


@pytest.mark.parametrize("values", [["cat", "dog", None], [0, 1, None], ["1", "0", ""]])
def test_metadata_name_or_number_the_class(values: list[Any], tmp_path: Path) -> None:
    lines = [{"file_name": f"{number}.png", "label": value} for number, value in enumerate(values)]
    for line in lines:
        photo(tmp_path / line["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = load_classification(DataConfig(path=str(tmp_path), eval_split=None))
    assert len(data.train) == 2 and data.facts["skipped"]["count"] == 1 and len(data.id2label) == 2
    wanted = {"cat": 0, "dog": 1, 0: 0, 1: 1, "1": 1, "0": 0}
    assert [int(item["labels"]) for item in data.train] == [wanted[value] for value in values[:2]]


def test_metadata_with_a_class_that_is_none(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": "emu"}')
    (tmp_path / "labels.json").write_text('{"0": "cat", "1": "dog"}')
    with pytest.raises(InputError, match=r"a\.png: expected a class of the set \(cat, dog\), got 'emu'"):
        load_classification(DataConfig(path=str(tmp_path), eval_split=None))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "size": 4}')
    with pytest.raises(InputError, match="expected metadata with lines like"):
        load_classification(DataConfig(path=str(tmp_path), eval_split=None))


def test_tables_with_class_names(tmp_path: Path) -> None:
    photo(tmp_path / "x" / "i.png")
    rows = {"image": [{"bytes": (tmp_path / "x/i.png").read_bytes(), "path": "i.png"}] * 3, "fine": [1, 0, -1]}
    features = Features({"image": Image(), "fine": ClassLabel(names=["cat", "dog"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    config = DataConfig(path=str(tmp_path / "t.parquet"), eval_split=None)
    data = load_classification(config)
    assert data.id2label == {0: "cat", 1: "dog"} and [int(item["labels"]) for item in data.train] == [1, 0]
    plain = {"image": rows["image"], "age": [1, 2, 3]}
    Dataset.from_dict(plain, Features({"image": Image(), "age": Value("int64")})).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="expected a column with the class of each image"):
        load_classification(config)


def test_cutmix_has_no_class(tmp_path: Path) -> None:
    config = DataConfig(path="shapes", strong={"images": "all", "cutmix": 0.5})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data\.strong\.cutmix: expected 0"):
        load_classification(config)


def test_a_batch_of_images_with_and_without_a_class() -> None:
    images = [torch.ones(3, 4, 6), torch.ones(3, 5, 4)]
    batch = classification_collate(
        [{"pixel_values": images[0], "labels": torch.tensor(3)}, {"pixel_values": images[1]}]
    )
    assert batch["pixel_values"].shape == (2, 3, 5, 6) and batch["labels"].tolist() == [3, -100]


def test_scores_are_shares_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 8, generator=generator), torch.randint(0, 7, (40,), generator=generator)
    labels[3] = -100
    names = {index: f"c{index}" for index in range(8)}
    rows = torch.cat([class_rows(logits[place : place + 7], labels[place : place + 7]) for place in range(0, 40, 7)])
    assert torch.equal(rows, class_rows(logits, labels))  # however they are shared out
    found, known = class_scores(rows, names), labels >= 0
    best = logits.topk(5).indices[known]
    assert found["accuracy"] == pytest.approx(float((best[:, 0] == labels[known]).float().mean()))
    assert found["top5_accuracy"] == pytest.approx(float((best == labels[known, None]).any(1).float().mean()))
    each = [float((logits.argmax(1)[labels == c] == c).float().mean()) for c in range(8) if (labels == c).any()]
    assert found["mean_accuracy"] == pytest.approx(np.mean(each)) and np.isnan(found["accuracy_c7"])
    matrix = confusion_of(rows.numpy(), 8)
    assert matrix.sum() == 39 and matrix.trace() / 39 == pytest.approx(found["accuracy"])
    assert np.isnan(probabilities(rows.numpy())[3])
    assert probabilities(rows.numpy())[0] == pytest.approx(float(logits[0].softmax(0)[labels[0]]), rel=1e-5)


def test_of_equal_logits_the_first_class_is_right() -> None:
    rows = class_rows(torch.zeros(2, 3), torch.tensor([0, 2]))
    assert rows[:, 2].tolist() == [0, 2] and class_scores(rows, {0: "a", 1: "b", 2: "c"})["accuracy"] == 0.5
