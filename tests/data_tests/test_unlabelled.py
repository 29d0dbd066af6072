"""Unlabelled images: where they come from, what each batch holds, and what is done to the student's picture alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cankd_hf.config.data import DataConfig, StrongConfig, labelled_in
from cankd_hf.data.common.batch import AREA, DRAWN, TEACHER_VIEW, BatchCollator
from cankd_hf.data.common.dataset import ImageDataset
from cankd_hf.data.common.mixing import Drawn, Shape, mix_plan, partners
from cankd_hf.data.common.seeds import seeded, students_seed
from cankd_hf.data.common.strong import Strong
from cankd_hf.data.common.unlabelled import MixedSampler, WithUnlabelled
from cankd_hf.data.common.unlabelled_stream import SharedOut, with_unlabelled
from cankd_hf.data.common.views import seeded_views
from cankd_hf.data.segmentation.load import SegmentationData, load_segmentation
from cankd_hf.errors import InputError
from cankd_hf.tasks import SegmentationTask
from cankd_hf.teachers.mixing import mix_outputs, stride_of
from cankd_hf.teachers.teacher import TeacherOutput

HALF = Shape(0.5, 0.5, 0.0, 0.0)  # the upper half of a square picture


def picture(file: Path, seed: int, size: tuple[int, int] = (24, 32)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def make_set(root: Path, masks: Sequence[bool] = (True, True, True, True), scored: int = 2) -> Path:
    """A folder with training images, of which some have no mask, and a validation split."""
    for split, has in (("train", masks), ("validation", [True] * scored)):
        lines = []
        for index, masked in enumerate(has):
            picture(root / split / f"{index}.png", 100 * len(split) + index)
            Image.fromarray(np.full((24, 32), index % 2, np.uint8)).save(root / split / f"{index}_mask.png")
            lines.append({"file_name": f"{index}.png", "mask_file_name": f"{index}_mask.png" if masked else None})
        (root / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "labels.json").write_text(json.dumps({"0": "sky", "1": "ground"}))
    return root


def loaded(root: Path, **settings: Any) -> SegmentationData:
    return load_segmentation(DataConfig(path=str(root), image_size=[32, 32], **settings))


def mixed(labelled: int, unlabelled: int, ratio: float = 1.0, seed: int = 3) -> Any:
    return seeded_views(WithUnlabelled(range(labelled), range(unlabelled), ratio), seed, None)


# Where they come from


def test_any_images_without_labels(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    for index in range(3):
        picture(tmp_path / "more" / "deep" / f"{index}.png", index)
    data = loaded(root, unlabelled=str(tmp_path / "more"))
    assert len(data.train) == 4 and len(data.unlabelled) == 3
    assert data.facts["unlabelled"] == {"source": str(tmp_path / "more"), "images": 3, "ratio": 1.0}
    assert data.facts["checked"] == 4 + 2 + 3
    item = data.unlabelled[0]
    assert "labels" not in item and item[TEACHER_VIEW].shape == item["pixel_values"].shape == (3, 32, 32)
    assert loaded(root).unlabelled is None and TEACHER_VIEW not in data.train[0]
    assert TEACHER_VIEW in loaded(root, strong=StrongConfig(images="all")).train[0]
    plain = loaded(root, unlabelled=str(tmp_path / "more"), strong=StrongConfig(images="none")).unlabelled[0]
    assert TEACHER_VIEW not in plain and DRAWN not in plain


def test_rows_without_a_mask(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", masks=(True, False, True, False, False))
    data = loaded(root, unlabelled="rows")
    assert len(data.train) == 2 and [data.unlabelled.name(i) for i in range(3)] == [
        f"train/{i}.png" for i in (1, 3, 4)
    ]
    with pytest.raises(InputError, match="expected images without a label in .*, got none"):
        loaded(make_set(tmp_path / "all"), unlabelled="rows")
    with pytest.raises(InputError, match="read at once"):
        loaded(root, unlabelled="rows", streaming=True)


def test_rows_of_a_table_without_a_mask(tmp_path: Path) -> None:
    from datasets import Dataset, Features
    from datasets import Image as Pictures

    images = [Image.fromarray(np.full((24, 32, 3), 9 * i, np.uint8)) for i in range(6)]
    masks = [None if i % 2 else Image.fromarray(np.full((24, 32), i % 2, np.uint8)) for i in range(6)]
    features = Features({"image": Pictures(), "mask": Pictures()})
    Dataset.from_dict({"image": images, "mask": masks}, features=features).save_to_disk(str(tmp_path / "table"))
    config = {"eval_split": None, "num_labels": 2}
    data = loaded(tmp_path / "table", unlabelled="rows", **config)
    assert len(data.train) == len(data.unlabelled) == 3
    assert data.unlabelled.raw(0).image.unique().tolist() == [9]
    again = loaded(tmp_path / "table", unlabelled=str(tmp_path / "table"), **config)
    assert len(again.unlabelled) == 6  # all of a set, with masks or not


def test_scored_images_are_refused_by_name(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    picture(tmp_path / "more" / "fine.png", 5)
    content = (root / "validation" / "1.png").read_bytes()
    (tmp_path / "more" / "stolen.png").write_bytes(content)
    found = r"stolen\.png = validation/1\.png \(eval\)"
    for check in (0, 1000):  # by their files even where no image is decoded
        with pytest.raises(InputError, match=found):
            loaded(root, unlabelled=str(tmp_path / "more"), check=check)
    (tmp_path / "more" / "stolen.png").unlink()
    Image.open(root / "validation" / "1.png").save(tmp_path / "more" / "other.bmp")  # the same picture, other bytes
    with pytest.raises(InputError, match=r"other\.bmp = validation/1\.png \(eval\)"):
        loaded(root, unlabelled=str(tmp_path / "more"))


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    with pytest.raises(InputError, match=r"data\.unlabelled: expected a folder"):
        loaded(root, unlabelled=str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"data\.unlabelled_split: expected a split of .* \(train, validation\)"):
        loaded(root, unlabelled=str(root), unlabelled_split="extra")


# What each batch holds


@pytest.mark.parametrize(("ratio", "batch", "own"), [(1, 8, 4), (4, 5, 1), (0.5, 6, 4), (3 / 7, 10, 7)])
def test_every_batch_has_the_ratio(ratio: float, batch: int, own: int) -> None:
    sampler = MixedSampler(mixed(13, 29, ratio), batch)
    visits = list(sampler)
    assert len(visits) == len(sampler) == -(-13 // batch) * batch  # as many batches as without the others
    for start in range(0, len(visits), batch):
        labelled = [visit.sample < 13 for visit in visits[start : start + batch]]
        assert labelled == [True] * own + [False] * (batch - own)
    assert len(MixedSampler(mixed(13, 29, ratio), batch, whole=True)) == 13 // batch * batch


def test_batches_that_cannot_be_shared_out() -> None:
    for batch, ratio, fix in ((5, 1, "4 or 6"), (16, 4, "15 or 20"), (1, 1, "2 or 4"), (4, 0.77, "whole numbers")):
        with pytest.raises(InputError, match=fix):
            labelled_in(batch, ratio)


def test_passes_go_on_from_epoch_to_epoch() -> None:
    data = mixed(5, 7)
    visits = []
    for epoch in range(8):
        data.set_epoch(epoch)
        visits += list(MixedSampler(data, 4))
    for first, last in ((0, 5), (5, 12)):
        half = [visit for visit in visits if first <= visit.sample < last]
        size = last - first
        for turn in range(len(half) // size):
            part = half[turn * size : (turn + 1) * size]
            assert sorted(visit.sample for visit in part) == list(range(first, last))
            assert {visit.view for visit in part} == {turn}
    assert visits[:4] == list(MixedSampler(mixed(5, 7), 4))[:4] != list(MixedSampler(mixed(5, 7, seed=4), 4))[:4]


def test_several_processes_see_the_images_of_one() -> None:
    def batches(data: Any, batch: int, world: int) -> list[set[Any]]:
        visits, size = list(MixedSampler(data, batch, world)), batch * world
        return [set(visits[start : start + size]) for start in range(0, len(visits), size)]

    for epoch in (0, 3):
        one, two = mixed(13, 29), mixed(13, 29)
        one.set_epoch(epoch), two.set_epoch(epoch)
        assert batches(one, 8, 1) == batches(two, 4, 2)


@pytest.mark.parametrize("labelled_streams", [True, False])
def test_streams_are_shared_out_too(labelled_streams: bool, tmp_path: Path) -> None:
    root = make_set(tmp_path / "set")
    for index in range(9):
        picture(tmp_path / "more" / f"{index}.png", index)
    settings = {"streaming": True} if labelled_streams else {"unlabelled_streaming": True}
    data = loaded(root, unlabelled=str(tmp_path / "more"), **settings)
    both = seeded_views(with_unlabelled(data.train, data.unlabelled, 2.0), 5, None)

    def seen(rank: int, world: int, batch: int) -> list[list[tuple[bool, bytes]]]:
        images = [
            ("labels" in item, item.get(TEACHER_VIEW, item["pixel_values"]).numpy().tobytes())
            for item in SharedOut(both, batch, rank, world)
        ]
        return [images[start : start + batch] for start in range(0, len(images), batch)]

    batches = seen(0, 1, 12)
    assert all([labelled for labelled, _ in batch] == [True] * 4 + [False] * 8 for batch in batches)
    assert batches == seen(0, 1, 12) and len(batches) == 2  # the epoch ends where both were read to their end
    assert len({image for batch in batches for labelled, image in batch[4:]}) == 16  # each pass has another crop
    two = [seen(rank, 2, 6) for rank in (0, 1)]
    assert {*two[0][0], *two[1][0]} == {*batches[0]}


# What is done to the student's picture


def test_partners_are_neighbours_of_one_half() -> None:
    assert partners([True, True, True, False, False, False, False]) == [1, 0, -1, 4, 3, 6, 5]
    assert partners([False]) == [-1]


def test_rectangles_are_multiples_of_the_stride_within_the_picture() -> None:
    for seed in range(200):
        area, aspect, top, left = np.random.default_rng(seed).uniform([0.02, 0.3, 0, 0], [0.4, 3.3, 1, 1]).tolist()
        y0, x0, y1, x1 = found = Shape(area, aspect, top, left).within(96, 160, 32) or ()
        assert all(value % 32 == 0 for value in found) and 0 <= y0 < y1 <= 96 and 0 <= x0 < x1 <= 160
    assert HALF.within(31, 64, 32) is None and HALF.within(64, 64, 32) == (0, 0, 32, 64)
    sizes = [(64, 64), (32, 96)]  # within the pictures of both
    assert mix_plan([Drawn(HALF)] * 2, sizes, [False] * 2, 32) == [(1, 0, 0, 32, 32), (0, 0, 0, 32, 32)]


def test_a_paste_is_exact_in_picture_target_and_what_counts() -> None:
    """Two constant images: where one is pasted all of it comes from there, and nothing elsewhere."""
    items = []
    for value in (1, 2):
        view = torch.full((3, 64, 64), 10 * value, dtype=torch.uint8)
        item = {"pixel_values": 2 * view, TEACHER_VIEW: view, DRAWN: Drawn(HALF if value == 1 else None)}
        items.append({**item, "labels": torch.full((64, 64), value), AREA: (0, 0, 64, 64 if value == 1 else 48)})
    task = SegmentationTask({0: "a", 1: "b", 2: "c"})
    collate = BatchCollator(task.collate, torch.float32, task.mix_labels)
    collate.stride = 16
    batch = collate(items)
    upper = torch.zeros(64, 64, dtype=torch.bool)
    upper[:48, :64] = True
    plan = batch.meta["mix"].tolist()
    assert plan[1] == [-1, 0, 0, 0, 0] and plan[0][0] == 1
    upper = torch.zeros(64, 64, dtype=torch.bool)
    upper[plan[0][1] : plan[0][3], plan[0][2] : plan[0][4]] = True
    assert 0 < upper.sum() < 64 * 64
    assert torch.equal(batch["pixel_values"][0, 0], torch.where(upper, 40, 20).to(torch.uint8))
    assert batch["pixel_values"][1].unique().tolist() == [40]
    assert batch[TEACHER_VIEW].flatten(1).unique(dim=1).tolist() == [[10], [20]]  # never mixed
    padding = torch.zeros(64, 64, dtype=torch.bool)
    padding[:, 48:] = True
    assert torch.equal(batch.meta["valid"][0], ~(upper & padding)) and torch.equal(batch.meta["valid"][1], ~padding)
    assert torch.equal(batch["labels"][0], torch.where(upper, torch.where(padding, 255, 2), 1))
    for stride in (4, 8, 16):
        cells = torch.arange(1.0, 3).view(2, 1, 1, 1).expand(2, 5, 64 // stride, 64 // stride)
        output = TeacherOutput([cells], cells)
        found = mix_outputs({"t": output}, batch.meta["mix"], (64, 64))["t"]
        for values in (found.maps[0], found.logits):
            assert values is not None and values[1].unique().tolist() == [2]
            assert torch.equal(values[0, 0], torch.where(upper[::stride, ::stride], 2.0, 1.0))


def test_answers_without_a_place_cannot_be_mixed() -> None:
    output = TeacherOutput([], torch.zeros(2, 3))
    mix = torch.tensor([[1, 0, 0, 8, 8], [-1, 0, 0, 0, 0]])
    with pytest.raises(InputError, match=r"data\.strong\.cutmix"):
        mix_outputs({"t": output}, mix, (16, 16))
    assert mix_outputs({"t": output}, None, (16, 16))["t"] is output


def test_strides_of_maps() -> None:
    assert [stride_of(12, 360), stride_of(90, 360), stride_of(32, 448), stride_of(1, 32)] == [32, 4, 14, 32]


def test_erased_pixels_are_mean_void_and_unseen() -> None:
    items = [
        {"pixel_values": torch.ones(3, 32, 32), DRAWN: Drawn(None, (HALF,)), "labels": torch.ones(32, 32).long()},
        {"pixel_values": torch.ones(3, 32, 32), DRAWN: Drawn(), "labels": torch.ones(32, 32).long()},
    ]
    task = SegmentationTask({0: "a", 1: "b"})
    collate = BatchCollator(task.collate, torch.float32, task.mix_labels)
    collate.stride = 8
    batch = collate(items)
    seen = batch.meta["seen"]
    assert 0 < (~seen[0]).sum() < 32 * 32 and seen[1].all() and "valid" not in batch.meta
    assert torch.equal(batch["pixel_values"][0, 0], seen[0].float())
    assert torch.equal(batch["labels"][0], torch.where(seen[0], 1, 255))
    assert items[0]["pixel_values"].unique().tolist() == [1]  # the data set's own picture is as it was


def test_the_students_picture_changes_where_the_teachers_comes_again() -> None:
    strong = Strong(StrongConfig(erase=[0.5]))
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)

    def drawn(view: int, epoch: int) -> tuple[dict[str, Any], float]:
        with students_seed(epoch), seeded(view):
            return strong({"pixel_values": pixels}), float(torch.rand(()))

    one, again, other = drawn(1, 1), drawn(1, 1), drawn(1, 2)
    assert torch.equal(one[0]["pixel_values"], again[0]["pixel_values"]) and one[0][DRAWN] == again[0][DRAWN]
    assert not torch.equal(one[0]["pixel_values"], other[0]["pixel_values"]) and one[0][DRAWN] != other[0][DRAWN]
    assert one[1] == other[1]  # nothing of it is taken from the random numbers of the view
    assert all(torch.equal(item[TEACHER_VIEW], pixels) for item, _ in (one, other))


def test_strength_and_chances() -> None:
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    off = StrongConfig(strength=0.0, cutmix=0.0)
    found = [Strong(off)({"pixel_values": pixels}) for _ in range(20)]
    assert all(torch.equal(item["pixel_values"], pixels) and item[DRAWN] == Drawn() for item in found)
    always = Strong(StrongConfig(cutmix=1.0, erase=[1.0, 0.0], strength=0.0))({"pixel_values": pixels})[DRAWN]
    assert always.cut is not None and len(always.erased) == 1
    grey = Strong(StrongConfig(jitter_p=0.0, grey=1.0, blur=0.0))({"pixel_values": pixels})["pixel_values"]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])


def test_the_background_of_a_crop_is_no_picture(tmp_path: Path) -> None:
    data = loaded(make_set(tmp_path / "set"), scale=[0.5, 0.5], flip=1.0)
    with seeded(3):
        item = data.train[0]
    top, left, bottom, right = item[AREA]
    assert (bottom - top, right - left) == (16, 16)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    assert torch.equal(item["labels"] != 255, inside)
    assert torch.equal(data.collate([item])["labels"][0] != 255, inside)
    assert AREA not in loaded(tmp_path / "set", scale=[1.0, 1.0]).train[0]
    batch = BatchCollator(data.collate, torch.float32)([item])
    assert torch.equal(batch.meta["valid"][0], inside) and "seen" not in batch.meta and "mix" not in batch.meta
    assert isinstance(data.train, ImageDataset)


def test_generated_images_and_settings_without_effect() -> None:
    config = {"path": "shapes", "crop_size": [32, 32], "generated": {"train": 4, "validation": 2, "unlabelled": 3}}
    data = load_segmentation(DataConfig(**config, unlabelled="shapes", unlabelled_streaming=True))
    assert len(data.unlabelled) == 3 and "data.unlabelled_streaming" in data.facts["warnings"][0]
    with pytest.raises(InputError, match=r"shapes/validation/1 \(eval\)"):
        load_segmentation(DataConfig(**config, unlabelled="shapes", unlabelled_split="validation"))
    warned = load_segmentation(DataConfig(**config, unlabelled_ratio=3.0, unlabelled_split="x")).facts["warnings"]
    assert warned == [
        "no effect with data.unlabelled: null: data.unlabelled_split, data.unlabelled_ratio; remove what is meant for "
        "other data"
    ]


def test_generated_images_are_no_stream(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"train": 4, "validation": 2, "test": 2}
    data = load_segmentation(DataConfig(path="shapes", generated=sizes, streaming=True, shuffle_buffer=3))
    said = "no effect with generated images: data.streaming, data.shuffle_buffer"
    assert said in data.facts["warnings"][0] and said in caplog.text
    assert len(data.train) == 4 and data.facts["streaming"] is False
