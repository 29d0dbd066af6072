"""The image processor beside a student gives what evaluation saw, and its answers are those that were scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.collate import original_sizes
from cankd_hf.data.detection.objects import Objects
from cankd_hf.data.detection.transforms import size_of_scale_one
from cankd_hf.metrics.segmentation import prediction_areas, segmentation_areas
from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNObjectDetectionOutput
from cankd_hf.tasks import DetectionTask, FeaturesTask, SegmentationTask
from cankd_hf.tasks.base import Task
from cankd_hf.tasks.detection_outputs import detections

NAMES = {0: "red", 1: "green", 2: "blue"}
PICTURES = [(48, 64), (37, 91), (200, 30), (101, 333), (64, 48), (17, 10)]  # height, width
NO_OBJECTS = Objects(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), torch.zeros(0).long(), 0)


def picture(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(height).integers(0, 255, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def evaluated(task: Task, config: DataConfig, image: Image.Image, label: Any = None) -> dict[str, Any]:
    return task.eval_transform(config)(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), label)


def saved_processor(task: Task, config: DataConfig, folder: Path) -> Any:
    task.image_processor(config).save_pretrained(folder)
    return AutoImageProcessor.from_pretrained(folder)


TASKS: dict[str, Task] = {
    "segmentation": SegmentationTask(NAMES),
    "features": FeaturesTask(),
    **{kind: DetectionTask(NAMES, kind) for kind in ("cankd_fpn", "detr", "yolos", "deformable_detr", "rt_detr")},
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", [None, [48, 64], [32, 32], [33, 47]], ids=str)
def test_equal_pixels_for_every_size_of_image(name: str, size: list[int] | None, tmp_path: Path) -> None:
    task = TASKS[name]
    for keep_aspect in (False, True) if isinstance(task, DetectionTask) else (False,):
        config = DataConfig(path="x", image_size=size, keep_aspect=keep_aspect, image_mean=[0.1, 0.5, 0.7])
        processor = saved_processor(task, config, tmp_path)
        for place in PICTURES:
            given = processor(images=picture(*place), return_tensors="pt")["pixel_values"][0]
            assert torch.equal(given, evaluated(task, config, picture(*place))["pixel_values"]), place


@pytest.mark.parametrize("name", ["cankd_fpn", "detr"])
def test_equal_batches_with_padding(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    config = DataConfig(path="x", image_size=[48, 64], keep_aspect=True)
    pictures = [picture(*place) for place in PICTURES]
    given = saved_processor(task, config, tmp_path)(images=pictures, return_tensors="pt")
    batch = task.collate([evaluated(task, config, one) for one in pictures])
    assert torch.equal(given["pixel_values"], batch["pixel_values"])
    assert torch.equal(given["pixel_mask"], batch["pixel_mask"])


def test_sizes_that_keep_the_aspect_are_those_of_the_image_processors() -> None:
    from transformers.image_transforms import get_size_with_aspect_ratio

    draws = np.random.default_rng(0).integers(20, 900, (500, 4)).tolist()
    for height, width, *size in draws:
        theirs = get_size_with_aspect_ratio((height, width), min(size), max(size))
        assert size_of_scale_one((height, width), size, True) == theirs
    assert size_of_scale_one((1, 1098), [60, 416], True) == (1, 416)  # theirs has no rows


def test_predicted_masks_are_those_that_were_scored(tmp_path: Path) -> None:
    task, config = TASKS["segmentation"], DataConfig(path="x", image_size=[48, 64])
    processor = saved_processor(task, config, tmp_path)
    logits = torch.randn(len(PICTURES), 3, 12, 16)
    found = processor.post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits), PICTURES)
    for one, row, place in zip(found, logits, PICTURES, strict=True):
        labels = torch.randint(0, 3, place)
        scored = segmentation_areas(row[None], labels[None], 3)[0]
        assert torch.equal(scored, prediction_areas(one, labels, 3))


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_predicted_boxes_are_those_that_were_scored(keep_aspect: bool, tmp_path: Path) -> None:
    task, config = TASKS["cankd_fpn"], DataConfig(path="x", image_size=[48, 64], keep_aspect=keep_aspect)
    processor = saved_processor(task, config, tmp_path)
    for place in PICTURES:
        item = evaluated(task, config, picture(*place), NO_OBJECTS)
        logits = torch.full((1, 20, 3), -1e4)
        logits[0, torch.arange(20), torch.arange(20) % 3] = torch.randn(20)
        output = FPNObjectDetectionOutput(logits=logits, pred_boxes=torch.rand(1, 20, 4))
        (found,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[place])
        sizes = original_sizes([item["labels"]], *item["pixel_values"].shape[-2:])
        (scored,) = detections(output, sizes, "cankd_fpn")
        for key, value in scored.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-3, msg=f"{key} {place}")
