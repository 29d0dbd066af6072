"""Boxes, masks of several sizes, odd numbers of images, a last batch of one: all arrive, and each is scored once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

from cankd_hf.data.common.batch import BatchCollator, Repeated
from cankd_hf.data.common.shares import StreamShare
from cankd_hf.errors import InputError
from cankd_hf.training.arguments import CanKDConfig
from tests.processes import run_two

from .ragged import Sized, Streamed, scores, train_boxes
from .tiny_trainers import Images, student, trainer, weights


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return scores(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("kind", ["stream", "sized"])
def test_a_stream_trains_with_all_boxes(kind: str, tmp_path: Path) -> None:
    boxes, losses = train_boxes(tmp_path, kind, batch=4)
    assert boxes == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]
    assert len(losses) == 4


def test_streams_score_as_map_style_data_sets(one: dict[str, dict[str, float]]) -> None:
    for name, found in one.items():
        same = one[
            " ".join(["masks map 13"] if name.endswith("workers") else [name.split()[0], "map", name.split()[2]])
        ]
        assert found == pytest.approx(same, abs=1e-6, nan_ok=True), name
    assert 0.2 < one["boxes stream 13"]["eval_ap50"] < 0.95


@pytest.mark.slow
def test_two_processes_score_and_train_as_one(one: dict[str, dict[str, float]], tmp_path: Path) -> None:
    run_two(Path(__file__).with_name("ragged_processes.py"), tmp_path)
    found = [json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2)]
    for name, expected in one.items():
        assert found[0]["scores"][name] == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    _, losses = train_boxes(tmp_path, "stream", batch=4)
    assert [box for both in zip(*(each["boxes"][0] for each in found), strict=True) for box in both] == [
        *[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3],
        *[1, 2],
    ]
    assert found[0]["boxes"][1] == pytest.approx(losses, abs=1e-4)
    assert found[0]["steps"] == [2, 2]


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("block", [1, 2])
def test_shares_are_equally_long_and_hold_each_sample_once(count: int, block: int) -> None:
    shares = [list(StreamShare(Sized(range(count)), rank, 3, block)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == len(StreamShare(Sized(range(count)), 0, 3, block))
    real = [item for share in shares for item in share if not isinstance(item, Repeated)]
    assert sorted(real) == list(range(count))


def test_shares_make_their_own_samples_only_and_repeat_what_is_skipped() -> None:
    made: list[int] = []

    class Lazy:
        def lazily(self):
            def make(number: int) -> int | None:
                made.append(number)
                return None if number in (1, 4) else number

            return ((lambda number=number: make(number)) for number in range(6))

    assert list(StreamShare(Lazy(), 0, 2)) == [0, 2, Repeated(2)]
    assert made == [0, 2, 4]
    # The first of this process cannot be used: the next is given twice, once as itself.
    assert list(StreamShare(Lazy(), 1, 2)) == [Repeated(3), 3, 5]

    class Nothing:
        def lazily(self):
            return iter([lambda: None])

    with pytest.raises(InputError, match="no usable image for process 0"):
        list(StreamShare(Nothing(), 0, 2))


def test_repeated_samples_are_marked_in_the_batch() -> None:
    images = Images(2)
    batch = BatchCollator(lambda samples: {"n": len(samples)})([images[0], Repeated(images[1])])
    assert batch.meta["repeated"].tolist() == [False, True] and batch["n"] == 2


def test_drop_last_drops_of_a_stream_too(tmp_path: Path) -> None:
    boxes, _ = train_boxes(tmp_path, "sized", batch=4, count=7, max_steps=2, dataloader_drop_last=True)
    assert boxes == [1, 2, 3, 1, 1, 2, 3, 1]


def test_what_would_cut_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"accelerator_config\.dispatch_batches: cuts boxes"):
        trainer(tmp_path, accelerator_config={"dispatch_batches": True})


@pytest.mark.parametrize("head", ["psp", "aspp", "upernet"])
def test_a_last_batch_of_one_image_trains_a_pooling_head(
    head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if head == "upernet":
        backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")
        backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
        model = UperNetForSemanticSegmentation(
            UperNetConfig(backbone_config=backbone, hidden_size=8, num_labels=4, use_auxiliary_head=False)
        )
    else:
        model = student(head=head, norm="batch")
    made = trainer(tmp_path, Images(5), model=model, per_device_train_batch_size=4, max_steps=-1, num_train_epochs=2)
    with caplog.at_level(logging.WARNING):
        made.train()
    assert made.state.global_step == 4
    assert all(torch.isfinite(value).all() for value in weights(made).values())
    told = [record.message for record in caplog.records if "a batch has one image" in record.message]
    assert len(told) == 1 and "dataloader_drop_last" in told[0]
    norms = [module for module in made.student.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(module.training for module in norms)


def test_full_batches_are_normalised_as_ever(tmp_path: Path) -> None:
    made = trainer(tmp_path, Images(4), model=student(head="psp", norm="batch"), max_steps=1)
    plain = student(head="psp", norm="batch").train()
    images = Images(4)
    pixels = torch.stack([images[i]["pixel_values"] for i in range(4)])
    made.student.train()
    assert torch.equal(made.student(pixels).logits, plain(pixels).logits)


def test_streams_of_one_process_are_read_by_it(tmp_path: Path) -> None:
    args = CanKDConfig(str(tmp_path), use_cpu=True, report_to="none")
    assert args.accelerator_config.dispatch_batches is None
    made = trainer(tmp_path, Streamed(Images(4)))
    assert made.accelerator.dataloader_config.dispatch_batches is False
