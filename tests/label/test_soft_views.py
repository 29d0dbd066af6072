"""Soft labels are drawn at the pixels of a picture, from the probabilities that lie there."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate
from torchvision import tv_tensors

from cankd_hf.config.data import DataConfig
from cankd_hf.data.common.places import bilinear
from cankd_hf.data.common.seeds import students_seed
from cankd_hf.data.common.soft import SoftMask, levels_of, probabilities
from cankd_hf.data.common.transforms import whole
from cankd_hf.data.segmentation.transforms import TrainTransform

HEIGHT, WIDTH, CLASSES = 48, 64, 4


def soft_mask(dtype: torch.dtype = torch.uint8, ignore_index: int = 255) -> SoftMask:
    generator = torch.Generator().manual_seed(3)
    logits = interpolate(3 * torch.randn(1, CLASSES, 3, 4, generator=generator), size=(12, 16), mode="bilinear")[0]
    labels = torch.full((HEIGHT, WIDTH), 2, dtype=dtype)
    labels[:10] = ignore_index
    teachers = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    teachers[:10] = teachers[:, 50:] = False  # a person's: void rows, and columns of class 2
    return SoftMask(labels, levels_of(logits), teachers, ignore_index)


@pytest.mark.parametrize(("seed", "scale", "flip"), [(1, (0.4, 0.5), 0.0), (2, (1.3, 2.0), 1.0), (5, (0.8, 1.2), 0.5)])
def test_frequencies_are_the_probabilities_of_the_whole_image_there(
    seed: int, scale: tuple[float, float], flip: float
) -> None:
    soft, draws = soft_mask(), 400
    config = DataConfig(path="x", crop_size=[30, 34], scale=list(scale), flip=flip)
    transform, image = TrainTransform(config), torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    exact = probabilities(soft.levels).double()[None]
    planes = interpolate(exact, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False)[0]
    torch.manual_seed(seed)
    labels, teachers = soft.masks()
    given = [torch.cat([planes, labels[None].double(), teachers[None].double()])]
    naive = transform.augment(tv_tensors.Image(image), whole(image), tv_tensors.Mask(given[0]))[2]
    naive = naive.as_subclass(torch.Tensor)
    found = []
    for draw in range(draws):
        torch.manual_seed(seed)
        with students_seed(draw):
            found.append(transform.unnormalized(image, soft)["labels"])
    drawn = torch.stack(found)
    mine = naive[-1] == 1
    assert drawn.dtype == torch.uint8 and mine.float().mean() > 0.2
    assert (drawn[:, ~mine] == naive[-2][~mine]).all(), "padding and what a person wrote is never drawn"
    off = torch.stack([(drawn == number).double().mean(0) for number in range(CLASSES)]) - naive[:CLASSES]
    assert off[:, mine].abs().max() < 0.15, "4.5 standard deviations, and half a pixel of the nearest neighbour"
    assert off[:, mine].mean(1).abs().max() < 5e-3 and off[:, mine].abs().mean() < 0.025


@pytest.mark.parametrize("ignore_index", [255, 1, -100])
def test_geometry_and_colours_are_those_of_a_hard_mask(ignore_index: int) -> None:
    soft = soft_mask(torch.int32, ignore_index)
    config = DataConfig(path="x", crop_size=[40, 40], scale=[0.5, 2.0], flip=0.5, color_jitter=0.3)
    transform = TrainTransform(config, ignore_index)
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
    labels, teachers = soft.masks()
    for seed in range(12):
        items, after = [], set()
        for label in (soft, soft, labels, teachers):
            torch.manual_seed(seed)
            with students_seed(seed):
                items.append(transform.unnormalized(image, label))
            after.add(float(torch.rand(1)))
            assert torch.equal(items[0]["pixel_values"], items[-1]["pixel_values"])
        assert len(after) == 1, "random numbers go on as without soft labels"
        first, again, hard, of_teacher = (item["labels"] for item in items)
        top, left, bottom, right = items[0].get("picture_area", (0, 0, 40, 40))
        drawn = torch.zeros(40, 40, dtype=torch.bool)
        drawn[top:bottom, left:right] = of_teacher[top:bottom, left:right] == 1
        assert torch.equal(first[~drawn], hard[~drawn]) and first.dtype == hard.dtype
        assert ((first >= 0) & (first < CLASSES))[drawn].all() and torch.equal(first, again)


def test_without_crop_the_label_of_the_data_set_is_not_changed() -> None:
    soft = soft_mask()
    before = soft.labels.clone()
    transform = TrainTransform(DataConfig(path="x", flip=0))
    image = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)
    with students_seed(0):
        one = transform.unnormalized(image, soft)["labels"]
    assert torch.equal(soft.labels, before) and (one != before).any()


@pytest.mark.parametrize(("first", "last", "cells", "pixels"), [(0, 30, 6, 30), (-20.3, 51.2, 9, 30), (4, 21, 1, 30)])
def test_bilinear_is_that_of_torch(first: float, last: float, cells: int, pixels: int) -> None:
    values = torch.randn(cells, dtype=torch.float64)
    read, weights = bilinear(torch.arange(pixels) + 0.5, first, last, cells)
    at = ((torch.arange(pixels).double() + 0.5 - first) / (last - first) * 2 - 1).view(1, 1, -1, 1)
    grid = torch.cat([at, torch.zeros_like(at)], -1)
    want = torch.nn.functional.grid_sample(
        values.view(1, 1, 1, -1), grid, padding_mode="border", align_corners=False
    ).flatten()
    assert torch.allclose(weights.double() @ values[read], want, atol=1e-4) and weights.shape[1] <= cells
