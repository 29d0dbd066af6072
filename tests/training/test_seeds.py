"""One seed decides everything that is drawn: order, augmentation, streams, workers and random teachers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.data.common.seeds import derived_seed, seeded
from cankd_hf.data.common.streams import StreamDataset, stream_of
from cankd_hf.data.common.views import seeded_views
from cankd_hf.data.generated import generated_splits
from cankd_hf.data.segmentation.transforms import TrainTransform
from cankd_hf.runs.build import build_student
from cankd_hf.runs.recipe import load_recipe
from cankd_hf.tasks import SegmentationTask
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.objective import Objective

from .test_commands import RESNET, recipe
from .tiny_trainers import Images, dinov2, student, trainer, weights


class Drawn(Images):
    """Noise from all three generators that an augmentation may use."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        noise = float(torch.rand(())) + float(np.random.rand()) + random.random()
        return {**item, "pixel_values": item["pixel_values"] + noise}


class Stream(IterableDataset):
    """The same, one after the other; with workers each takes every n-th."""

    def __init__(self, count: int) -> None:
        self.images = Drawn(count)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, len(self.images), step):
            yield self.images[index]


def shapes_stream() -> StreamDataset:
    """A stream of ours, with a shuffle buffer and random crops."""
    source = generated_splits({"train": 12, "size": 40})["train"]
    return StreamDataset(stream_of(source), TrainTransform(DataConfig(path="shapes", crop_size=[32, 32])), 8)


def dropping(seed: int = 0) -> Any:
    """A student that draws random numbers too, between the batches."""
    return student(seed, dropout=0.1, num_labels=6)


def trained(folder: Path, data: Any, **settings: Any) -> dict[str, torch.Tensor]:
    made = trainer(folder, data, model=dropping(), per_device_train_batch_size=4, max_steps=4, **settings)
    made.train()
    return weights(made)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_numbers_inside_depend_on_the_seed_and_those_outside_go_on() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    undisturbed = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with seeded(derived_seed(5, "a")):
        first = draw()
    assert draw() == undisturbed
    with seeded(derived_seed(5, "a")):
        assert draw() == first
    with seeded(derived_seed(5, "b")):
        assert not set(draw()) & set(first)


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        ("map", 0),
        ("our stream", 2),
        *(pytest.param(*slow, marks=pytest.mark.slow) for slow in [("stream", 0), ("our stream", 0), ("map", 2)]),
    ],
)
def test_a_seed_gives_the_same_run_and_another_one_another(kind: str, workers: int, tmp_path: Path) -> None:
    def data() -> Any:
        if kind == "our stream":
            return shapes_stream()
        return Drawn(12) if kind == "map" else Stream(12)

    def run(**settings: Any) -> dict[str, torch.Tensor]:
        random.seed(), np.random.seed(None), torch.seed()  # what was drawn before does not matter
        return trained(tmp_path, data(), dataloader_num_workers=workers, **settings)

    first = run(seed=3)
    assert equal(first, run(seed=3))
    assert not equal(first, run(seed=4))
    if kind != "stream" and not workers:  # the order of a stream of somebody else is its own
        other = run(seed=3, data_seed=4)
        assert not equal(first, other) and equal(other, run(seed=3, data_seed=4))


def test_data_seed_draws_other_augmentation_for_the_same_weights() -> None:
    def pixels(seed: int, data_seed: int | None) -> torch.Tensor:
        return seeded_views(Drawn(2), seed, data_seed)[1]["pixel_values"]

    assert torch.equal(pixels(3, None), pixels(3, None)) and not torch.equal(pixels(3, None), pixels(3, 4))
    assert torch.equal(pixels(3, 4), pixels(5, 4)) and torch.equal(pixels(3, 4), pixels(4, None))


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.slow
def test_a_resumed_stream_goes_on_as_if_it_had_never_stopped(workers: int, tmp_path: Path) -> None:
    """Also after the stream has begun anew: 12 images are 3 batches (with two workers 4, two of them of 2 images)."""

    def made(folder: str, **settings: Any) -> Any:
        settings |= {"per_device_train_batch_size": 4, "max_steps": 5, "seed": 7, "dataloader_num_workers": workers}
        return trainer(tmp_path / folder, shapes_stream(), model=dropping(), **settings)

    whole = made("whole", save_strategy="steps", save_steps=1)
    whole.train()
    for step in (1, 3, 4):
        again = made(f"from{step}")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert equal(weights(whole), weights(again)), step


def test_random_teachers_are_drawn_from_the_seed(tmp_path: Path) -> None:
    config = TeacherConfig(config=dinov2())
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    torch.manual_seed(1)
    one = load_teacher(config, seed=5)
    assert torch.equal(torch.rand(3), undisturbed)
    assert one.fingerprint == load_teacher(config, seed=5).fingerprint != load_teacher(config, seed=6).fingerprint
    assert one.manifest()["seed"] == 5

    def fingerprints(**settings: Any) -> list[str]:
        torch.seed()
        two = {"a": config, "b": config}
        terms = [LossTerm(loss="instance_mse", teacher=name, name=name) for name in two]
        made = trainer(tmp_path, Images(8), teacher=None, teachers=two, terms=terms, **settings)
        return [teacher.fingerprint for teacher in made.teachers.values()]

    first = fingerprints(seed=3)
    assert len(set(first)) == 2 and fingerprints(seed=3) == first
    assert not set(fingerprints(seed=4)) & set(first)


def test_a_run_with_a_random_teacher_resumes(tmp_path: Path) -> None:
    def made(folder: str) -> Any:
        return trainer(
            tmp_path / folder, Images(16), teacher=TeacherConfig(config=dinov2()), save_strategy="steps", save_steps=1
        )

    whole = made("whole")
    whole.train()
    again = made("again")
    torch.seed()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert equal(weights(whole), weights(again))


@pytest.mark.slow
def test_phases_follow_the_seed(tmp_path: Path) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        torch.seed()
        made = trainer(tmp_path, Drawn(8), model=dropping(), teacher=TeacherConfig(config=dinov2()), seed=seed)
        made.train()
        made.set_objective(Objective(terms=[LossTerm(loss="instance_mse", pairs=[[2, 0]])]))
        made.train()
        return weights(made)

    first = run(3)
    assert equal(first, run(3)) and not equal(first, run(4))


def test_of_several_teachers_to_be_trained_each_starts_from_its_own_weights(tmp_path: Path) -> None:
    config = {"model_type": "cankd_fpn", "backbone_config": RESNET, "fpn_channels": 16}
    several = {"teacher": None, "teachers": {"a": {"config": config}, "b": {"config": config}}}
    file = recipe(tmp_path, distill={"terms": [{"loss": "cankd", "teacher": "a"}]}, **several)
    loaded, task = load_recipe(file), SegmentationTask({0: "a", 1: "b"})
    built = {
        name: next(build_student(loaded, task, StudentConfig(config=config), name).parameters())
        for name in ("teacher", "teacher a", "teacher b")
    }
    assert len({float(value.detach().sum()) for value in built.values()}) == 3
    again = next(build_student(loaded, task, StudentConfig(config=config), "teacher b").parameters())
    assert torch.equal(built["teacher b"], again)
