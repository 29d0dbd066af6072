"""Stored answers for whole images: what is cut out of them for a crop, what is stored, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cankd_hf.config.data import DataConfig, StrongConfig
from cankd_hf.config.teacher import CacheConfig, TeacherConfig
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.decode import Mask, Sample
from cankd_hf.data.common.strong import strongly
from cankd_hf.data.common.unlabelled import WithUnlabelled
from cankd_hf.data.detection.transforms import DetectionTrainTransform
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.transforms import TrainTransform
from cankd_hf.errors import InputError
from cankd_hf.tasks import DetectionTask
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.trainer import CanKDTrainer

from .detector_trainers import NAMES, STUDENTS, objects
from .tiny_trainers import Images, dinov2, largest_difference, terms, trainer, weights

STEPS = {"max_steps": 8, "per_device_train_batch_size": 4}


class Waves:
    """Images whose colours change slowly from place to place, each another way."""

    generated = True

    def __init__(self, count: int, size: tuple[int, int] = (90, 120), first: int = 0) -> None:
        self.count, self.size, self.first = count, size, first

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"wave {index}"

    def load(self, index: int) -> Sample:
        height, width = self.size
        rows = torch.arange(height).view(-1, 1) / height * math.pi
        columns = torch.arange(width).view(1, -1) / width * math.pi
        number = self.first + index
        waves = [torch.sin(rows * (1 + number % 2) / 2 + number) + torch.cos(columns + k + number) for k in range(3)]
        image = (torch.stack(waves) + 2) * 63
        return Sample(image.byte(), Mask((image[0] > 127).long()), self.name(index))


class Pooled(nn.Module):
    """Maps that say what is where: the mean of each 4 x 4 pixels, and of each 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.AvgPool2d(4, ceil_mode=True), nn.AvgPool2d(4, ceil_mode=True)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.coarse(self.fine(pixel_values)) + self.bias  # type: ignore[no-any-return]


class Turned(TrainTransform):
    """A user's own transform, which may move what is where."""


def cache(folder: Path, **changes: Any) -> CacheConfig:
    return CacheConfig(**{"whole": True, "codec": "exact", "folder": str(folder), **changes})


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"path": "", "crop_size": [48, 64], "image_size": [60, 80], "color_jitter": 0.0, **changes})


def waves(count: int = 16, size: tuple[int, int] = (90, 120), first: int = 0, **changes: Any) -> ImageDataset:
    return ImageDataset(Waves(count, size, first), TrainTransform(config(**changes)))


def pooling(folder: Path, data: Any = None, **changes: Any) -> CanKDTrainer:
    one = Teacher(Pooled(), TeacherConfig(taps=["fine", "coarse"], cache=cache(folder / "s")))
    pairs = terms(loss="instance_mse", options={}, pairs=[[0, 0], [2, 1]])
    settings = {"teacher": one, "terms": pairs, "data_collator": segmentation_collate, **STEPS, **changes}
    return trainer(folder / "run", data or waves(), **settings)


@pytest.mark.parametrize(
    "changes",
    [{}, {"scale": [0.5, 0.6]}, {"scale": [1.9, 2.0]}, {"image_size": None}, {"flip": 1.0}, {"flip": 0.0}],
    ids=str,
)
def test_what_is_cut_out_is_what_the_teacher_says_of_the_crop(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Of a teacher whose answer for a place does not depend on what is around it."""
    made = pooling(tmp_path, waves(**changes))
    made.open_stores()
    worst, compared = [0.0, 0.0], 0
    for batch in made.first_batches(4):
        cut, live = made.source(batch)["teacher"], made.source.run("teacher", batch.teacher_images)  # type: ignore[attr-defined]
        valid = batch.meta.get("valid", torch.ones(len(cut.maps[0]), *batch.teacher_images.shape[-2:]))
        for level, (one, other) in enumerate(zip(cut.maps, live.maps, strict=True)):
            assert one.shape == other.shape and one.dtype == other.dtype
            inside = F.adaptive_avg_pool2d(valid[:, None].float(), one.shape[-2:]).expand_as(one) > 0.999
            compared += int(inside.sum())
            worst[level] = max(worst[level], float((one - other)[inside].abs().max()))
    assert compared > 1000 and worst[0] < 0.04 and worst[1] < 0.2


def test_a_shift_of_one_cell_would_be_seen(tmp_path: Path) -> None:
    made = pooling(tmp_path, waves(scale=[1.0, 1.0]))
    made.open_stores()
    (batch,) = made.first_batches(1)
    fine = made.source(batch)["teacher"].maps[0]
    live = made.source.run("teacher", batch.teacher_images).maps[0]  # type: ignore[attr-defined]
    assert float((fine[..., 1:] - live[..., :-1]).abs().max()) > 0.1


def test_mirrored_images_have_answers_of_their_own(tmp_path: Path) -> None:
    """A ViT with positions: the answer for a mirrored image is no mirrored answer."""
    one = load_teacher(TeacherConfig(config=dinov2(), cache=cache(tmp_path / "s")), seed=5)
    data = waves(4, size=(56, 84), crop_size=[56, 84], image_size=[56, 84], scale=[1.0, 1.0], flip=0.5)
    made = trainer(tmp_path / "run", data, teacher=one, data_collator=segmentation_collate, **STEPS)
    made.open_stores()
    seen = set()
    for batch in made.first_batches(1):
        cut = made.source(batch)["teacher"].maps[0]
        live = made.source.run("teacher", batch.teacher_images).maps[0]  # type: ignore[attr-defined]
        assert torch.allclose(cut, live, atol=1e-4)
        seen |= {*batch.meta["place"][:, 4].tolist()}
    assert seen == {0.0, 1.0}


def test_a_run_that_reads_is_the_run_that_filled_and_no_picture_repeats(tmp_path: Path) -> None:
    filled = pooling(tmp_path)
    filled.train()
    read = pooling(tmp_path, logging_steps=8)
    read.teachers["teacher"].register_forward_pre_hook(
        lambda *_: pytest.fail("the teacher is run though all is stored")
    )
    read.train()
    assert largest_difference(weights(filled), weights(read)) == 0.0
    facts = [made.cache_facts()["teacher"] for made in (filled, read)]
    assert facts[1]["hits"] == 32 and facts[1]["misses"] == 0 and 16 <= facts[0]["misses"] <= 32
    assert len(read.stored["teacher"].store) == facts[0]["misses"]
    first = read.train_dataset[3]["pixel_values"]
    read.train_dataset.set_epoch(5)
    assert not torch.equal(read.train_dataset[3]["pixel_values"], first)


def test_other_images_are_missed_and_other_sizes_are_other_stores(tmp_path: Path) -> None:
    pooling(tmp_path, waves(flip=0.0), max_steps=4).train()
    changed = pooling(tmp_path, waves(flip=0.0, first=100), max_steps=4)
    changed.train()
    assert changed.cache_facts()["teacher"]["misses"] == 16
    larger = pooling(tmp_path, waves(flip=0.0, image_size=[66, 88]), max_steps=4)
    larger.train()
    assert larger.stored["teacher"].store.folder != changed.stored["teacher"].store.folder


def test_images_of_several_sizes_and_without_labels(tmp_path: Path) -> None:
    """Each half has images of its own; what the student alone sees of them differs from what is stored."""
    settings = config(image_size=None, strong=StrongConfig(images="unlabelled"))
    labelled = ImageDataset(Waves(8, (90, 120)), TrainTransform(settings))
    without = ImageDataset(Waves(8, (60, 100), 50), strongly(TrainTransform(settings), settings))
    made = pooling(tmp_path, WithUnlabelled(labelled, without))
    made.train()
    assert made.cache_facts()["teacher"]["misses"] > 16
    for batch in made.first_batches(2):
        cut = made.source(batch)["teacher"].maps[0]
        live = made.source.run("teacher", batch.teacher_images).maps[0]  # type: ignore[attr-defined]
        valid = batch.meta.get("valid", torch.ones(4, *batch.teacher_images.shape[-2:]))[:, None].float()
        inside = F.adaptive_avg_pool2d(valid, cut.shape[-2:]).expand_as(cut) > 0.999
        assert float((cut - live)[inside].abs().max()) < 0.15


def test_all_can_be_stored_before(tmp_path: Path) -> None:
    made = pooling(tmp_path, waves(6))
    assert made.plan_stores(6 * made.answers_each)["teacher"].answers == 12
    made.open_stores()
    assert sum(made.fill()) == 12 and len(made.stored["teacher"].store) == 12
    assert sum(made.fill()) == 12 and made.cache_facts()["teacher"]["hits"] == 12
    read = pooling(tmp_path, waves(6))
    read.train()
    assert read.cache_facts()["teacher"]["misses"] == 0


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="teacher.cache.whole: expected images in .* got Images, which does not; set views: 16"
    ):
        pooling(tmp_path, Images(8))
    with pytest.raises(InputError, match="teacher.cache.whole: .* got Turned, which does not"):
        pooling(tmp_path, ImageDataset(Waves(8), Turned(config())))
    pooled = Teacher(Pooled(), TeacherConfig(taps=["fine"], cache=cache(tmp_path / "s")))
    views = load_teacher(TeacherConfig(config=dinov2(), cache=CacheConfig(views=2)))
    with pytest.raises(InputError, match="teachers: expected one number of views, one seed and one `whole`"):
        trainer(tmp_path / "a", waves(), teacher=None, teachers={"a": pooled, "b": views}, terms=terms(teacher="a"))
    for settings, said in (
        ({"whole": True, "views": 4}, "views: expected none with whole: true"),
        ({"whole": True, "seed": 4}, "seed: counts for views only"),
        ({}, "views: expected a number of views, such as 16, or whole: true"),
    ):
        found = [f"{key}: {message}" for key, message in CacheConfig(**settings).problems()]  # type: ignore[arg-type]
        assert len(found) == 1 and said in found[0]


class Boxes(Waves):
    """The same images with an object in each."""

    def load(self, index: int) -> Sample:
        sample = super().load(index)
        box, one = torch.tensor([[20.0, 10.0, 80.0, 70.0]]), torch.ones(1, dtype=torch.int64)
        return sample._replace(target=objects(box, one, index))


@pytest.mark.parametrize("changes", [{}, {"crop_size": None}, {"keep_aspect": True, "crop_size": None}], ids=str)
def test_images_with_boxes(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Where detectors' pictures are, with and without crops, padded to the largest of the batch."""
    settings = config(**{"scale": [0.7, 1.4], **changes})
    data = ImageDataset(Boxes(8), DetectionTrainTransform(settings))
    one = Teacher(Pooled(), TeacherConfig(taps=["fine"], cache=cache(tmp_path / "s")))
    made = trainer(
        tmp_path / "run",
        data,
        model=DetectionTask(NAMES).build_student(STUDENTS["retinanet"]),
        task=DetectionTask(NAMES),
        teacher=one,
        terms=terms(loss="instance_mse", options={}, pairs=[[0, 0]]),
        **STEPS,
    )
    made.open_stores()
    for batch in made.first_batches(2):
        cut = made.source(batch)["teacher"].maps[0]
        live = made.source.run("teacher", batch.teacher_images).maps[0]  # type: ignore[attr-defined]
        height, width = batch.teacher_images.shape[-2:]
        left, top, right, bottom = (side.view(-1, 1, 1) for side in batch.meta["place"][:, :4].T)
        rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
        image = (rows >= top) & (rows + 1 <= bottom) & (columns >= left) & (columns + 1 <= right)
        inside = F.avg_pool2d(F.pad(image[:, None].float(), (0, -width % 4, 0, -height % 4)), 4).expand_as(cut) == 1
        assert inside.float().mean() > 0.3
        assert float((cut - live)[inside].abs().max()) < 0.06
    made.train()
