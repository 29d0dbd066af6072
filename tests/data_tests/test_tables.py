"""Parquet, saved data sets and streams."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.errors import InputError

datasets = pytest.importorskip("datasets")
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` sleeps 5 s after each shuffled parquet stream (around an arrow bug at interpreter exit)."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


def as_table(root: Path, split: str, columns: tuple[str, str] = ("image", "mask")) -> Any:
    files = [json.loads(line) for line in (root / split / "metadata.jsonl").read_text().splitlines()]
    folder = root / split
    table = datasets.Dataset.from_dict(
        {
            columns[0]: [str(folder / row["file_name"]) for row in files],
            columns[1]: [str(folder / row["mask_file_name"]) for row in files],
            "id": list(range(len(files))),
        }
    )
    return table.cast_column(columns[0], datasets.Image()).cast_column(columns[1], datasets.Image())


@pytest.fixture
def parquet(make_folder: Make, tmp_path: Path) -> Path:
    """A folder of parquet files, one a split, images embedded, with a labels file beside."""
    root, target = make_folder(), tmp_path / "parquet"
    target.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        table = as_table(root, split).with_format("arrow").map(datasets.table.embed_table_storage, batched=True)
        table.with_format(None).to_parquet(target / f"{name}-00000-of-00001.parquet")
    (target / "labels.json").write_text((root / "labels.json").read_text())
    return target


def same_items(one: Any, two: Any) -> None:
    assert len(one) == len(two)
    for index in range(len(one)):
        first, second = one.raw(index), two.raw(index)
        assert torch.equal(first.image, second.image) and torch.equal(first.label, second.label)


def test_parquet_folder_equals_the_folder(parquet: Path, tmp_path: Path) -> None:
    data = load_segmentation(DataConfig(path=str(parquet)))
    plain = load_segmentation(DataConfig(path=str(tmp_path / "set")))
    same_items(data.train, plain.train)
    same_items(data.eval, plain.eval)
    assert data.id2label == plain.id2label


def test_parquet_glob_and_file(parquet: Path) -> None:
    config = DataConfig(path=str(parquet / "train-*.parquet"), train_split="train[:50%]", eval_split="train[50%:]")
    data = load_segmentation(config)
    assert (len(data.train), len(data.eval)) == (2, 2)
    config.path = str(parquet / "train-00000-of-00001.parquet")
    assert len(load_segmentation(config).train) == 2
    config.path = str(parquet / "none-*.parquet")
    with pytest.raises(InputError, match="found none at"):
        load_segmentation(config)


def test_other_column_names_and_a_saved_data_set(make_folder: Make, tmp_path: Path) -> None:
    root = make_folder()
    saved = tmp_path / "saved"
    splits = {"train": as_table(root, "train", ("photo", "truth")), "test": as_table(root, "val", ("photo", "truth"))}
    datasets.DatasetDict(splits).save_to_disk(saved)
    labels = str(root / "labels.json")
    data = load_segmentation(DataConfig(path=str(saved), eval_split=None, test_split="test", labels=labels))
    assert data.eval is None and len(data.test) == 2
    named = DataConfig(path=str(saved), eval_split="test", labels=labels, image_column="photo", mask_column="truth")
    same_items(load_segmentation(named).eval, data.test)
    named.mask_column = "mask"
    with pytest.raises(
        InputError, match=r"data.mask_column: expected one of the image columns \['truth'\], got 'mask'"
    ):
        load_segmentation(named)


def test_a_broken_row_is_named(parquet: Path) -> None:
    table = datasets.load_dataset("parquet", data_files=str(parquet / "train-*.parquet"), split="train")
    rows = table.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[2]["image"] = {"bytes": b"nothing", "path": "x.png"}
    features = table.features
    datasets.Dataset.from_list(rows, features=features).to_parquet(parquet / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"train\[2\].image \(x.png\): expected an image that decodes"):
        load_segmentation(DataConfig(path=str(parquet)))
    data = load_segmentation(DataConfig(path=str(parquet), on_error="skip"))
    assert len(data.train) == 3 and data.facts["skipped"]["count"] == 1


def test_a_parquet_row_reads_no_file_of_this_machine(tmp_path: Path, make_folder: Make) -> None:
    root, target = make_folder(), tmp_path / "p.parquet"
    rows = [{"image": {"bytes": None, "path": str(root / "train" / "images" / f"{index}.png")}} for index in range(3)]
    kinds = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    datasets.Dataset.from_list(rows, features=datasets.Features({"image": kinds})).to_parquet(target)
    with pytest.raises(InputError, match="holds no image, only the path"):
        load_images(DataConfig(path=str(target), holdout=0.5))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_streams_give_every_image_once(parquet: Path, tmp_path: Path, kind: str, workers: int) -> None:
    path = parquet if kind == "parquet" else tmp_path / "set"
    data = load_segmentation(DataConfig(path=str(path), streaming=True, crop_size=[16, 16], shuffle_buffer=3))
    with pytest.raises(TypeError):
        len(data.train)
    loader = torch.utils.data.DataLoader(data.train, batch_size=2, num_workers=workers, collate_fn=data.collate)
    batches = list(loader)
    assert sum(len(batch["pixel_values"]) for batch in batches) == 4
    assert batches[0]["pixel_values"].shape[1:] == (3, 16, 16) and batches[0]["labels"].dtype == torch.int64
    assert len(data.eval.preview(9)) == 2 and data.facts["streaming"] and data.facts["splits"]["train"] is None


def test_a_stream_shuffles_anew_in_each_epoch_and_ends_at_its_limit(make_folder: Make) -> None:
    root = make_folder(train=12)
    config = DataConfig(path=str(root), streaming=True, max_train_samples=10)
    data = load_segmentation(config).train

    def order(epoch: int) -> list[str]:
        data.set_epoch(epoch)
        return [sample.name for sample in data.preview(99)]

    assert order(0) != order(1) and order(0) == order(0) and len(set(order(1))) == 10


def test_a_stream_skips_and_names(make_folder: Make, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder()
    (root / "train" / "images" / "1.png").write_bytes(b"")
    config = DataConfig(path=str(root), streaming=True, crop_size=[16, 16])
    with pytest.raises(InputError, match="train/images/1.png"):
        list(load_segmentation(config).train)
    config.on_error = "skip"
    assert len(list(load_segmentation(config).train)) == 3
    assert "train/images/1.png" in caplog.text


def test_images_of_a_table_need_no_masks(parquet: Path) -> None:
    data = load_images(DataConfig(path=str(parquet)))
    assert set(data.train[0]) == {"pixel_values"} and len(data.eval) == 2


def test_a_hub_set_that_is_not_there_says_so() -> None:
    with pytest.raises(InputError, match="data.path: expected a folder, a parquet file or a Hub data set"):
        load_segmentation(DataConfig(path="nobody/no-such-data-set"))
