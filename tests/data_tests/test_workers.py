"""Data sets in loading processes that are spawned, as on macOS, Windows and with Python 3.14; and the cache there."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common import cache
from cankd_hf.data.common.batch import BatchCollator
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.decode import Sample, Unusable
from cankd_hf.data.common.targets import Mask
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.features.load import load_images
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.data.segmentation.transforms import TrainTransform
from cankd_hf.errors import InputError
from tests.training.detection_folders import write_boxes, write_coco
from tests.training.tiny_trainers import trainer

datasets = pytest.importorskip("datasets")
GENERATED = {"train": 3, "validation": 2, "test": 2, "size": 32}
SIZES: dict[str, Any] = {"image_size": [24, 32], "crop_size": [16, 16], "color_jitter": 0.2}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


def object_table(folder: Path, target: Path) -> Path:
    """The images and boxes of a folder as parquet."""
    lines = [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]
    columns = {
        "image": [{"bytes": (folder / "train" / line["file_name"]).read_bytes(), "path": None} for line in lines],
        "objects": [line["objects"] for line in lines],
    }
    target.mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(target / "train-00000-of-00001.parquet")
    (target / "labels.json").write_text((folder / "labels.json").read_text())
    return target


def every_set(make_folder: Callable[..., Path], tmp_path: Path, streaming: bool) -> Iterator[Any]:
    """A training set of every loader (of streams one for evaluation, which draws nothing), and its task's collator."""
    masks, boxes = make_folder(), write_boxes(tmp_path / "boxes", train=3, others=2)
    coco = write_coco(tmp_path / "coco", {"train": "train2017", "val": "val2017"})
    table = object_table(boxes, tmp_path / "table")
    loads: list[tuple[Callable[..., Any], Any, dict[str, Any]]] = [
        (load_segmentation, masks, {}),
        (load_images, masks, {}),
        (load_detection, boxes, {"keep_aspect": True}),
        (load_detection, coco, {"train_split": "train2017", "eval_split": "val2017"}),
        (load_detection, table, {"eval_split": "train"}),
    ]
    if not streaming:
        loads.append((load_segmentation, "shapes", {"generated": GENERATED}))
        loads += [(load, path, {**more, "cache": True}) for load, path, more in loads]
    for load, path, more in loads:
        role = "eval" if streaming else "train"
        data = load(DataConfig(path=str(path), streaming=streaming, **{**SIZES, **more}), splits=(role,))
        yield getattr(data, role), data.collate


def spawned(data: Any) -> DataLoader:
    """A loader of single samples with one spawned process."""
    return DataLoader(data, collate_fn=itemgetter(0), num_workers=1, multiprocessing_context="spawn")


def assert_same(one: Any, two: Any) -> None:
    """Equal tensors in equal places."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        assert_same(list(one.values()), list(two.values()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_same(first, second)
    else:
        assert one == two


@pytest.mark.slow
def test_every_data_set_gives_the_same_in_a_spawned_worker(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    sets, collators = zip(*every_set(make_folder, tmp_path, streaming=False), strict=True)
    seeded = [SeededDataset(one, seed=i) for i, one in enumerate(sets)]
    for one in seeded:
        one.set_epoch(3)  # another view, which the worker must know
    together = ConcatDataset(seeded)
    here = [together[index] for index in range(len(together))]
    for one, other in zip(here, spawned(together), strict=True):
        assert_same(one, other)
    for one, collate in zip(seeded, collators, strict=True):
        collator = BatchCollator(collate)
        samples = [one[index] for index in range(2)]
        assert_same(collator(samples), pickle.loads(pickle.dumps(collator))(samples))


@pytest.mark.slow
def test_every_stream_gives_the_same_in_a_spawned_worker(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    streams = [stream for stream, _ in every_set(make_folder, tmp_path / "streams", streaming=True)]
    here = [item for stream in streams for item in stream]
    for one, other in zip(here, spawned(ChainDataset(streams)), strict=True):
        assert_same(one, other)


class CountedSource:
    """A source that writes down each decoding, by process and image; odd images of `broken` do not decode."""

    generated = False

    def __init__(self, log: Path, size: int = 6, broken: bool = False) -> None:
        self.log, self.size, self.broken = log, size, broken

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> Sample:
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        if self.broken and index % 2:
            raise Unusable(f"{index}: broken")
        return Sample(torch.full((3, 4, 5), index, dtype=torch.uint8), Mask(torch.zeros(4, 5).byte()), str(index))


def jittered(image: torch.Tensor, label: torch.Tensor) -> dict[str, Any]:
    """Changes the image in place, by a random number: what the cache keeps must not see it."""
    return {"pixel_values": image.add_(int(torch.randint(1, 50, ()))), "labels": label}


def decoded(log: Path) -> list[int]:
    return sorted(int(line) for line in log.read_text().split())


def test_two_workers_decode_each_image_once_in_all_epochs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    data = SeededDataset(ImageDataset(CountedSource(log), jittered, cache=True), seed=0)
    plain = SeededDataset(ImageDataset(CountedSource(tmp_path / "other"), jittered), seed=0)
    forked = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    spawned = DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    )
    for epoch, loader in enumerate((forked, forked, spawned, spawned)):
        data.set_epoch(epoch)
        plain.set_epoch(epoch)
        for number, item in enumerate(loader):
            assert torch.equal(item["pixel_values"], plain[number]["pixel_values"])
        assert decoded(log) == list(range(6))
    assert torch.equal(copy.deepcopy(data)[2]["pixel_values"], data[2]["pixel_values"])
    assert decoded(log) == list(range(6))


def test_a_cached_set_skips_and_stops_as_another(tmp_path: Path) -> None:
    for on_error in ("skip", "stop"):
        source = CountedSource(tmp_path / on_error, 4, broken=True)
        cached, plain = (ImageDataset(source, jittered, cache=kept, on_error=on_error) for kept in (True, False))
        if on_error == "stop":
            for one in (cached, plain):
                with pytest.raises(Unusable, match="1: broken"):
                    one[1]
            continue
        for _ in range(2):
            torch.manual_seed(0)
            first = cached[1]
            torch.manual_seed(0)
            assert_same(first, plain[1])
            assert (first["labels"] == 255).all()


def test_a_full_disk_or_memory_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = ImageDataset(CountedSource(tmp_path / "log"), jittered, cache=True)
    data[0]
    monkeypatch.setattr(cache, "ROOM", 2**60)
    with caplog.at_level(logging.WARNING, logger="cankd_hf"):
        for index in (0, 1, 2, 1):
            data[index]
        copy.deepcopy(data)[2]
    assert decoded(tmp_path / "log") == [0, 1, 1, 2, 2]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("data.cache: 1 images are kept in ") and "TMPDIR" in told


def test_a_folder_that_went_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = ImageDataset(CountedSource(tmp_path / "log"), jittered, cache=True)
    data[0]
    data._cache.folder.joinpath("0").unlink()
    data._cache.folder.rmdir()
    for index in (0, 1):
        assert data[index]["pixel_values"].shape == (3, 4, 5)
    assert len(caplog.records) == 1 and "data.cache" in caplog.text


KILLED = """
import os, signal, sys
from cankd_hf.data.common.cache import SampleCache
made = SampleCache()
print(made.folder, flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "fork" and os.fork() == 0:
    del made  # a fork does not remove what its parent uses
    sys.exit(0)
if sys.argv[1] == "fork":
    os.wait()
    assert made.folder.is_dir()
"""


def test_the_folder_goes_with_its_process(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def run(how: str) -> Path:
        command = [sys.executable, "-c", KILLED, how]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=how != "kill")
        return Path(done.stdout.strip())

    killed = run("kill")
    assert killed.is_dir() and killed.parent == tmp_path
    ended = run("fork")
    assert ended.name and not ended.exists() and not killed.exists()  # the next cache removed that one, too


def test_dropping_a_set_removes_its_folder(tmp_path: Path) -> None:
    data = ImageDataset(CountedSource(tmp_path / "log"), jittered, cache=True)
    data[0]
    folder, other = data._cache.folder, pickle.loads(pickle.dumps(data))
    del other
    assert folder.is_dir()
    del data
    assert not folder.exists()


def test_a_stream_cannot_be_cached() -> None:
    with pytest.raises(InputError, match=r"data\.cache: expected false with data\.streaming"):
        DataConfig(path="anything", streaming=True, cache=True).check_values()


@pytest.mark.parametrize("persistent", [False, True])
def test_a_trainer_with_two_workers_decodes_each_image_once_a_run(persistent: bool, tmp_path: Path) -> None:
    class Large(CountedSource):
        def load(self, index: int) -> Sample:
            small = super().load(index)
            return Sample(small.image.new_full((3, 64, 64), index), Mask(torch.zeros(64, 64).byte()), str(index))

    log = tmp_path / "log"
    data = ImageDataset(Large(log), TrainTransform(DataConfig(path="shapes", color_jitter=0.2)), cache=True)
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    made = trainer(tmp_path / "run", data=data, per_device_train_batch_size=2, max_steps=9, **workers)
    made.train()
    assert made.state.epoch == 3 and decoded(log) == list(range(6))
