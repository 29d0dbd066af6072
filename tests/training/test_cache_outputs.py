"""Stored teachers: logits, classes in a student's order, and queries of DETR-like detectors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from cankd_hf.config.distill import LossTerm
from cankd_hf.config.teacher import CacheConfig, TeacherConfig
from cankd_hf.losses.kl import KLLoss
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.stored import StoredTeacher
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.trainer import CanKDTrainer

from .detector_trainers import Boxed
from .test_cache import FPN
from .test_teachers_logits import detr_like, named
from .tiny_trainers import student, trainer


def cache(folder: Path, codec: str) -> CacheConfig:
    return CacheConfig(views=2, codec=codec, folder=str(folder))  # type: ignore[arg-type]


def opened(folder: Path, one: Teacher, terms: list[LossTerm], **settings: Any) -> tuple[CanKDTrainer, StoredTeacher]:
    made = trainer(folder, settings.pop("data", None), teacher=one, terms=terms, **settings)
    made.open_stores()
    return made, made.stored["teacher"]


class Own(KLLoss):
    """A loss that may read anything of the logits."""


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "own"])
def test_bytes_of_logits_are_for_losses_that_are_known_to_take_a_softmax(loss: str, tmp_path: Path) -> None:
    """The others would lose what is far below the best class; they find no store of bytes either."""

    def made(kind: str) -> StoredTeacher:
        one = load_teacher(TeacherConfig(config=FPN, cache=cache(tmp_path / "s", "int8")), seed=1)
        options = {} if kind == "own" else {"activation": kind}
        return opened(tmp_path / "a", one, [LossTerm(loss=Own if kind == "own" else "kl", options=options)])[1]

    first = made("softmax")
    assert first.rows.codecs["logits"].kind == "int8"
    one = made(loss)
    assert one.rows.codecs["logits"].kind == ("int8" if loss == "softmax" else "fp16")
    assert (one.store.folder == first.store.folder) == (loss == "softmax")


def test_classes_in_another_order_are_another_store(tmp_path: Path) -> None:
    by = student(1)
    folders = []
    for names in ("road sky tree car", "car sky tree road", "road sky tree car"):
        one = Teacher(
            named(copy.deepcopy(by), "road", "sky", "tree", "car"), TeacherConfig(cache=cache(tmp_path, "exact"))
        )
        pupil = named(student(), *names.split())
        made, stored = opened(tmp_path / "a", one, [LossTerm(loss="kl")], model=pupil)
        for batch in made.first_batches(2):
            replayed, exact = made.source(batch)["teacher"], one(batch.teacher_images)
            assert torch.equal(replayed.logits, exact.logits)
        folders.append(stored.store.folder)
        stored.store.flush()
    assert folders[0] == folders[2] != folders[1]


def detr(folder: Path, codec: str, *losses: str) -> tuple[CanKDTrainer, StoredTeacher]:
    """A trainer of a DETR-like detector with terms on what another one says."""
    one = Teacher(detr_like("rt_detr", 1), TeacherConfig(cache=cache(folder / "s", codec)))
    settings = {"model": detr_like("rt_detr"), "data": Boxed(8), "per_device_train_batch_size": 4}
    return opened(folder / "a", one, [LossTerm(loss=loss) for loss in losses], **settings)


@pytest.mark.parametrize("codec", ["exact", "fp16", "int8", "pca"])
def test_queries_are_stored(codec: str, tmp_path: Path) -> None:
    filled, stored = detr(tmp_path, codec, "query_logits")
    for batch in filled.first_batches(2):
        filled.source(batch)
    close = {"rtol": 0.0, "atol": 0.0} if codec == "exact" else {"rtol": 2e-3, "atol": 1e-4}
    for batch in filled.first_batches(2):
        replayed, exact = (
            filled.source(batch)["teacher"].queries,
            filled.teachers["teacher"](batch.teacher_images).queries,
        )
        assert replayed is not None and exact is not None and replayed.keys() == exact.keys()
        for name, value in exact.items():
            torch.testing.assert_close(replayed[name], value, **close)
    assert stored.found.hits == 8 == stored.found.misses


def test_a_store_with_more_than_is_read_can_be_added_to(tmp_path: Path) -> None:
    first = detr(tmp_path, "exact", "instance_mse", "query_logits")[1]
    made, second = detr(tmp_path, "exact", "instance_mse")
    assert second.store.folder == first.store.folder
    for batch in made.first_batches(2):
        made.source(batch)
    second.store.flush()
    made, third = detr(tmp_path, "exact", "pseudo_boxes")
    assert third.store.folder == first.store.folder
    for batch in made.first_batches(2):
        assert made.source(batch)["teacher"].queries is not None
    assert (third.found.hits, third.found.misses) == (8, 0)
