"""Images that stay bytes up to the device: the batches of a trainer are those of its data set's float items."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.batch import NORMALIZE, Batch, BatchCollator, takes_bytes
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.views import SeededDataset, unnormalized
from cankd_hf.data.detection.load import load_detection
from cankd_hf.data.features.load import load_images
from cankd_hf.data.generated import ShapesSource
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.data.segmentation.transforms import TrainTransform
from cankd_hf.tasks import DetectionTask, SegmentationTask
from tests.training.detection_folders import write_boxes
from tests.training.detector_trainers import NAMES, STUDENTS
from tests.training.tiny_trainers import student, trainer

from .conftest import picture


def assert_same(one: Any, two: Any) -> None:
    """Equal tensors of one type in equal places."""
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        assert_same(list(one.values()), list(two.values()))
    elif isinstance(one, list):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_same(first, second)
    else:
        assert one == two


def sets(make_folder: Callable[..., Path], tmp_path: Path) -> dict[str, tuple[Any, Any]]:
    """Training set and evaluation set of each task, with padding in evaluation, where images keep their sizes."""
    root, boxes = make_folder(train=4, val=2), write_boxes(tmp_path / "boxes", train=3, others=2)
    picture(7, (40, 20)).save(root / "val" / "images" / "0.png")
    picture(7, (120, 100)).save(boxes / "val" / "0.png")
    sizes: dict[str, Any] = {"crop_size": [16, 24], "color_jitter": 0.2, "image_mean": [0.3, 0.4, 0.5]}
    features = load_images(DataConfig(path=str(root), **sizes))
    detection = load_detection(DataConfig(path=str(boxes), **sizes))
    shapes = DataConfig(path="shapes", generated={"train": 4, "validation": 3, "size": 32}, **sizes)
    masks = load_segmentation(shapes)
    return {"features": (features, 4), "detection": (detection, 3), "segmentation": (masks, 4)}


def test_batches_are_those_of_float_items(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    for data, count in sets(make_folder, tmp_path).values():
        collate = BatchCollator(data.collate, torch.float32)
        for dataset, size in ((SeededDataset(data.train, seed=5), count), (data.eval, len(data.eval))):
            later = unnormalized(dataset)
            bytes_, floats = [later[i] for i in range(size)], [dataset[i] for i in range(size)]
            assert all(item["pixel_values"].dtype == torch.uint8 for item in bytes_)
            assert all(item["pixel_values"].dtype == torch.float32 and NORMALIZE not in item for item in floats)
            sent = pickle.loads(pickle.dumps(collate(bytes_)))  # as between processes
            assert isinstance(sent, Batch) and sent["pixel_values"].dtype == torch.uint8
            made, expected = sent.to("cpu"), collate(floats)
            assert made.later is None
            assert_same(dict(made), dict(expected))
            assert sent.to("meta")["pixel_values"].dtype == torch.float32  # no value is read on the way


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_of_a_trainer_give_normalised_batches(workers: int, tmp_path: Path) -> None:
    data = load_segmentation(DataConfig(path="shapes", generated={"train": 8, "validation": 3, "size": 64}))
    made = trainer(
        tmp_path,
        data=data.train,
        model=student(num_labels=6),
        eval_dataset=data.eval,
        dataloader_num_workers=workers,
        per_device_eval_batch_size=3,
    )
    seen: list[torch.dtype] = []
    collate = made.data_collator.collate
    made.data_collator.collate = takes_bytes(
        lambda samples: seen.append(samples[0]["pixel_values"].dtype) or collate(samples)
    )
    (batch,) = made.get_train_dataloader()
    again = BatchCollator(collate, torch.float32)([made.train_dataset[int(i)] for i in batch["meta"]["sample"]])
    assert_same(dict(batch), dict(again))
    (batch,) = made.get_eval_dataloader()
    assert_same(batch["pixel_values"], torch.stack([item["pixel_values"] for item in data.eval]))
    assert seen == ([] if workers else [torch.uint8, torch.uint8])
    assert data.train[0]["pixel_values"].dtype == torch.float32  # the user's own set is as it was
    later = made.data_collator([unnormalized(data.eval)[0]])
    assert_same(made._prepare_inputs(later)["pixel_values"], data.eval[0]["pixel_values"][None])


def test_a_detector_gets_its_padded_images(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    data = load_detection(DataConfig(path=str(write_boxes(tmp_path / "boxes", train=2, others=2)), scale=[0.8, 1.2]))
    task = DetectionTask(NAMES)
    made = trainer(
        tmp_path, data.train, model=task.build_student(STUDENTS["fcos"]), task=task, per_device_train_batch_size=2
    )
    (batch,) = made.get_train_dataloader()
    assert_same(dict(batch), dict(made.data_collator([made.train_dataset[int(i)] for i in batch["meta"]["sample"]])))
    assert (batch["pixel_values"].movedim(1, -1)[batch["pixel_mask"] == 0] == 0).all()


def test_what_is_not_ours_gets_floats(tmp_path: Path) -> None:
    class Noisy(TrainTransform):
        def __call__(self, image: Tensor, label: Any) -> dict[str, Any]:
            item = super().__call__(image, label)
            return {**item, "pixel_values": item["pixel_values"] + np.random.rand() + random.random()}

    class Kept(ImageDataset):
        """A user's kind of our set."""

    source = ShapesSource("train", 8, 64)
    config = DataConfig(path="shapes", crop_size=[64, 64])
    noisy = SeededDataset(ImageDataset(source, Noisy(config)), seed=1)
    for dataset in (noisy, Kept(source, TrainTransform(config)), [{"pixel_values": torch.zeros(3, 4, 4)}]):
        assert unnormalized(dataset)[0]["pixel_values"].dtype == torch.float32
    first = noisy[2]["pixel_values"]
    np.random.rand(), random.random(), torch.rand(1)
    assert torch.equal(noisy[2]["pixel_values"], first)  # all its random numbers follow from the seed
    seen: list[torch.dtype] = []

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(sample["pixel_values"].dtype for sample in samples)
        return {key: torch.stack([sample[key] for sample in samples]) for key in ("pixel_values", "labels")}

    ours = ImageDataset(source, TrainTransform(config))
    own = ImageDataset(source, TrainTransform(config))
    own.transform.normalize = lambda image: image.float()  # which no loading process could send
    assert unnormalized(own)[0]["pixel_values"].dtype == torch.float32
    drawing = SeededDataset(ours, seed=1)
    drawing.dataset = ImageDataset(source, Noisy(config))  # after the trainer was made
    first = drawing[2]["pixel_values"]
    np.random.rand()
    assert torch.equal(drawing[2]["pixel_values"], first)
    next(iter(trainer(tmp_path, data=ours, model=student(num_labels=6), data_collator=collate).get_train_dataloader()))
    assert set(seen) == {torch.float32}


def test_a_task_with_a_collate_of_its_own_gets_floats(tmp_path: Path) -> None:
    class Mixing(SegmentationTask):
        def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
            mixed = [
                {**item, "pixel_values": (item["pixel_values"] + samples[0]["pixel_values"]) / 2} for item in samples
            ]
            return super().collate(mixed)

    data = load_segmentation(DataConfig(path="shapes", generated={"train": 8, "validation": 1, "size": 64}))
    task = Mixing({number: str(number) for number in range(6)})
    made = trainer(tmp_path, data=data.train, model=student(num_labels=6), task=task)
    (batch,) = made.get_train_dataloader()
    items = [made.train_dataset[int(i)] for i in batch["meta"]["sample"]]
    assert torch.equal(batch["pixel_values"], made.task.collate(items)["pixel_values"])
    assert set(made.student(**batch.inputs)) >= {"loss", "logits"}


def test_seeding_ours_leaves_other_random_numbers_alone() -> None:
    ours = SeededDataset(ImageDataset(ShapesSource("train", 2, 32), TrainTransform(DataConfig(path="shapes"))), seed=0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    ours[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
