"""What the data give is what the detectors of `transformers` take: their own processor makes the same of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cankd_hf.config.data import DataConfig
from cankd_hf.data.detection.collate import detection_collate, original_objects, original_sizes
from cankd_hf.data.detection.objects import Objects
from cankd_hf.data.detection.transforms import DetectionEvalTransform

transformers = pytest.importorskip("transformers")


@pytest.fixture
def samples() -> list[tuple[torch.Tensor, Objects]]:
    """Two images of different sizes."""
    made = []
    for number, (height, width) in enumerate([(48, 64), (70, 40)]):
        image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        boxes = torch.tensor([[4.0, 6.0, 30.5, 40.0], [1.0, 2.0, 20.0, 12.0]])[: 2 - number]
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        classes = torch.tensor([2, 0])[: 2 - number]
        made.append((image, Objects(boxes, classes, area, torch.zeros_like(classes), number)))
    return made


def detr() -> Any:
    """A DETR of a few thousand parameters."""
    backbone = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(**backbone, out_features=["stage4"]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=3,
    )
    return transformers.DetrForObjectDetection(config)


def test_labels_are_those_of_the_processor(samples: list[tuple[torch.Tensor, Objects]]) -> None:
    processor = transformers.DetrImageProcessor(do_resize=False)
    annotations = []
    for _, objects in samples:
        xywh = torch.cat([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], 1).tolist()
        entries = [
            {"bbox": box, "category_id": label, "area": area, "iscrowd": 0, "image_id": objects.image_id}
            for box, label, area in zip(xywh, objects.classes.tolist(), objects.area.tolist(), strict=True)
        ]
        annotations.append({"image_id": objects.image_id, "annotations": entries})
    theirs = processor([image for image, _ in samples], annotations=annotations, return_tensors="pt")
    transform = DetectionEvalTransform(DataConfig())
    ours = detection_collate([transform(*sample) for sample in samples])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])
    for one, two in zip(ours["labels"], theirs["labels"], strict=True):
        torch.testing.assert_close(one["boxes"], torch.as_tensor(two["boxes"]))
        assert torch.equal(one["class_labels"], torch.as_tensor(two["class_labels"]))
        assert one["image_id"].tolist() == torch.as_tensor(two["image_id"]).tolist()
        assert one["orig_size"].tolist() == torch.as_tensor(two["orig_size"]).tolist()


@pytest.mark.parametrize("make", [detr])
def test_a_native_detector_takes_the_batch(
    make: Callable[[], Any], samples: list[tuple[torch.Tensor, Objects]]
) -> None:
    transform = DetectionEvalTransform(DataConfig(image_size=[40, 60], keep_aspect=True))
    batch = detection_collate([transform(*sample) for sample in samples])
    outputs = make()(**batch)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    height, width = batch["pixel_values"].shape[-2:]
    sizes = original_sizes(batch["labels"], height, width)
    # a model that gives each object its box has it in the pixels of the data set's image
    for label, size, (_, objects) in zip(batch["labels"], sizes, samples, strict=True):
        count = len(objects.boxes)
        outputs.logits, outputs.pred_boxes = torch.zeros(1, count, 4), label["boxes"][None]
        processor = transformers.DetrImageProcessor()
        (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=size[None])
        torch.testing.assert_close(found["boxes"], objects.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(original_objects(label, size)["boxes"], objects.boxes, atol=1e-3, rtol=0)


def test_a_pyramid_detector_from_batch_to_score(samples: list[tuple[torch.Tensor, Objects]]) -> None:
    """Padded batch -> losses; detections in pixels of the data set's images -> statistics -> scores."""
    from cankd_hf.metrics.detection import detection_scores, detection_statistics
    from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
    from cankd_hf.models.fpn.modeling_cankd_fpn_detection import FPNForObjectDetection

    names = {0: "cat", 1: "dog", 2: "emu"}
    backbone = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    backbone |= {"model_type": "resnet", "out_indices": [1, 2, 3, 4]}
    model = FPNForObjectDetection(
        FPNConfig(backbone, head="fcos", fpn_channels=8, head_layers=1, score_threshold=0.0, id2label=names)
    )
    transform = DetectionEvalTransform(DataConfig(image_size=[40, 60], keep_aspect=True))
    batch = detection_collate([transform(*sample) for sample in samples])
    outputs = model.eval()(**batch)
    assert outputs.loss.isfinite()
    labels, mask = batch["labels"], batch["pixel_mask"]
    sizes = original_sizes(labels, *batch["pixel_values"].shape[-2:])
    found = model.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    own = torch.stack([label["orig_size"] for label in labels])
    same = model.post_process_object_detection(outputs, threshold=0.0, target_sizes=own, pixel_mask=mask)
    for one, two, (height, width) in zip(found, same, own.tolist(), strict=True):
        torch.testing.assert_close(one["boxes"], two["boxes"], atol=1e-3, rtol=0)
        assert len(one["boxes"]) and one["boxes"].min() >= -1e-3
        assert (one["boxes"].amax(0) <= torch.tensor([width, height, width, height]) + 1e-3).all()
    targets = [original_objects(label, size) for label, size in zip(labels, sizes, strict=True)]
    scores = detection_scores(detection_statistics(found, targets), names)
    assert 0 <= scores["ap"] < 0.5 and scores["ap_agnostic"] >= 0
