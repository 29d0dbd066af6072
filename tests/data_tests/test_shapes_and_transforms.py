"""The generated set, the joint transforms and the collator."""

from __future__ import annotations

import pytest
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.transforms import RandomScaleCrop
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.data.features.load import load_images
from cankd_hf.data.generated import SHAPE_CLASSES, ShapesSource
from cankd_hf.data.segmentation.collate import segmentation_collate
from cankd_hf.data.segmentation.load import load_segmentation
from cankd_hf.data.segmentation.transforms import EvalTransform, TrainTransform
from cankd_hf.errors import InputError

SIZES = {"train": 6, "validation": 3, "test": 2, "size": 32}


def shapes_config(**changes: object) -> DataConfig:
    return DataConfig(**({"path": "shapes", "generated": SIZES, "test_split": "test"} | changes))  # type: ignore[arg-type]


def test_generated_images_are_the_same_every_time_and_differ_by_split() -> None:
    one, again = ShapesSource("train", 4, 48).load(2), ShapesSource("train", 9, 48).load(2)
    assert torch.equal(one.image, again.image) and torch.equal(one.label, again.label)
    assert not torch.equal(one.image, ShapesSource("test", 4, 48).load(2).image)
    assert one.image.dtype == torch.uint8 and one.image.shape == (3, 48, 48) and one.label.shape == (48, 48)


def test_generated_masks_hold_every_class_and_colour_tells_none() -> None:
    source = ShapesSource("train", 60, 48)
    samples = [source.load(index) for index in range(60)]
    labels = torch.stack([sample.label for sample in samples])
    pixels = torch.stack([sample.image for sample in samples]).float()
    assert set(labels.unique().tolist()) == set(SHAPE_CLASSES)
    means = [pixels.permute(0, 2, 3, 1)[labels == label].mean().item() for label in SHAPE_CLASSES]
    assert max(means) - min(means) < 30  # of a spread of about 50 between single shapes


def test_generated_data_has_all_splits() -> None:
    data = load_segmentation(shapes_config())
    assert (len(data.train), len(data.eval), len(data.test)) == (6, 3, 2)
    assert data.facts["splits"] == {"train": 6, "eval": 3, "test": 2}
    assert set(data.palette) == set(data.id2label) == set(range(6))
    item = data.train[0]
    assert item["pixel_values"].dtype == torch.float32 and item["labels"].dtype == torch.int64


def test_unknown_generated_key_and_bad_values_are_all_named() -> None:
    with pytest.raises(InputError) as caught:
        load_segmentation(shapes_config(generated={"trian": 3}, flip=2.0, on_error="go", crop_size=[3]))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "data.crop_size",
        "data.flip",
        "data.on_error",
        "data.generated.trian",
    ]


@pytest.mark.parametrize("shape", [(37, 53), (8, 400), (1, 1), (90, 20)])
@pytest.mark.parametrize("base", [None, [40, 60]])
def test_image_and_mask_are_cut_alike(shape: tuple[int, int], base: list[int] | None) -> None:
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    config = shapes_config(image_size=base, crop_size=[24, 32], scale=[0.4, 2], **plain)
    transform = TrainTransform(config, ignore_index=255)
    for seed in range(12):
        torch.manual_seed(seed)
        mask = (torch.arange(shape[1]) * 250 // shape[1]).to(torch.uint8).expand(shape).contiguous()
        item = transform(mask.expand(3, *shape).contiguous(), mask)
        assert item["pixel_values"].shape == (3, 24, 32) and item["labels"].shape == (24, 32)
        inside = item["labels"] != 255
        assert inside.any()
        gap = (item["pixel_values"][0] * 255 - item["labels"])[inside].abs()
        assert gap.median() <= 250 / shape[1] + 1  # at most one source pixel apart: they went the same way


def test_crop_at_its_own_size_moves_no_pixel() -> None:
    image = torch.randint(0, 255, (3, 24, 32), dtype=torch.uint8)
    crop = RandomScaleCrop((24, 32), (1.0, 1.0), None, [0, 0, 0], 255)
    from torchvision import tv_tensors

    assert torch.equal(crop(tv_tensors.Image(image)).as_subclass(torch.Tensor), image)


def test_eval_keeps_the_mask_at_its_own_size() -> None:
    transform = EvalTransform(shapes_config(image_size=[16, 20]))
    item = transform(torch.zeros(3, 33, 47, dtype=torch.uint8), torch.zeros(33, 47, dtype=torch.uint8))
    assert item["pixel_values"].shape == (3, 16, 20) and item["labels"].shape == (33, 47)
    expected = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(item["pixel_values"][:, 0, 0], expected)


def test_collate_pads_and_tells_sizes() -> None:
    small = {"pixel_values": torch.ones(3, 8, 8), "labels": torch.zeros(8, 8, dtype=torch.int64)}
    wide = {"pixel_values": torch.ones(3, 6, 12), "labels": torch.zeros(6, 12, dtype=torch.int64)}
    batch = segmentation_collate([small, wide])
    assert batch["pixel_values"].shape == (2, 3, 8, 12) and batch["labels"].shape == (2, 8, 12)
    assert "label_sizes" not in batch  # both are padded alike
    assert (batch["labels"][1, 6:] == 255).all() and (batch["pixel_values"][1, :, 6:] == 0).all()
    resized = segmentation_collate([small, {**small, "labels": torch.zeros(20, 10, dtype=torch.int64)}])
    assert resized["label_sizes"].tolist() == [[8, 8], [20, 10]] and resized["labels"].shape == (2, 20, 10)
    assert "labels" not in segmentation_collate([{"pixel_values": torch.ones(3, 8, 8)}])


def test_augmentation_hangs_on_seed_epoch_and_index_only() -> None:
    data = SeededDataset(load_segmentation(shapes_config(crop_size=[16, 16])).train, seed=0)
    data.set_epoch(1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = data[3]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    again = data[3]
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and torch.equal(first["labels"], again["labels"])
    data.set_epoch(2)
    assert not torch.equal(first["pixel_values"], data[3]["pixel_values"])


def test_augmentation_does_not_hang_on_workers() -> None:
    data = SeededDataset(load_segmentation(shapes_config(crop_size=[16, 16])).train, seed=0)
    data.set_epoch(5)
    alone = torch.stack([data[index]["pixel_values"] for index in range(6)])
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, collate_fn=segmentation_collate)
    assert torch.equal(alone, torch.cat([batch["pixel_values"] for batch in loader]))


def test_cache_gives_the_same_items() -> None:
    plain = SeededDataset(load_segmentation(shapes_config()).train, seed=0)
    cached = SeededDataset(load_segmentation(shapes_config(cache=True)).train, seed=0)
    for data in (plain, cached, cached):
        torch.testing.assert_close(data[1]["pixel_values"], plain[1]["pixel_values"], rtol=0, atol=0)


def test_images_without_labels() -> None:
    data = load_images(shapes_config())
    assert set(data.train[0]) == {"pixel_values"} and len(data.eval) == 3
    unlabelled = load_segmentation(shapes_config(), need_labels=False)
    assert set(unlabelled.eval[0]) == {"pixel_values"}


def test_a_validation_part_is_held_out() -> None:
    data = load_images(shapes_config(eval_split=None, holdout=0.34))
    assert len(data.eval) == 2 and len(data.train) == 4
    assert not set(data.eval.indices) & set(data.train.indices)
