"""Mask AP equals that of the evaluator on files of COCO's form, whatever the batches and processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cankd_hf.data.detection.masks import boxes_of
from cankd_hf.metrics.detection import detection_scores, detection_statistics
from cankd_hf.metrics.masks import instance_statistics, segmentations
from cankd_hf.run_lengths import encoded

NAMES = {0: "cat", 1: "dog"}
SIZES = [(40, 60), (90, 130), (64, 64), (33, 200), (50, 50)]


def scene(size: tuple[int, int], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Detections and ground truth of an image: ellipses, some found nearly, some twice, one a crowd."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")

    def ellipse(values: Tensor) -> Tensor:
        cx, cy, a, b = (values * torch.tensor([size[1], size[0], size[1] / 4, size[0] / 4])).tolist()
        return ((x - cx) / (a + 2)) ** 2 + ((y - cy) / (b + 2)) ** 2 < 1

    shapes = torch.rand(4, 4, generator=generator)
    kinds = torch.randint(0, 2, (4,), generator=generator)
    masks = torch.stack([ellipse(one) for one in shapes])
    moved = shapes.repeat(2, 1) + 0.03 * torch.randn(8, 4, generator=generator)
    guesses = torch.stack([ellipse(one.clamp(0.05, 0.95)) for one in moved])
    crowd = torch.tensor([0, 0, int(seed == 1), 0])
    truth = {"class_labels": kinds, "boxes": boxes_of(masks), "masks": masks, "iscrowd": crowd}
    truth |= {
        "area": masks.flatten(1).sum(1).float(),
        "orig_size": torch.tensor(size),
        "image_id": torch.tensor([seed]),
    }
    labels = torch.where(torch.rand(8, generator=generator) < 0.8, kinds.repeat(2), 1 - kinds.repeat(2))
    found = {"scores": torch.rand(8, generator=generator), "labels": labels, "boxes": boxes_of(guesses)}
    return {**found, "masks": guesses}, truth


def scores(statistics: dict[str, Any]) -> dict[str, float]:
    masks = [segmentations(text) for text in np.asarray(statistics["masks"])]
    return detection_scores(np.asarray(statistics["boxes"]), NAMES, masks)


def of_files(pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> np.ndarray:
    """The twelve numbers of COCO, from annotations and results as files have them."""
    from faster_coco_eval import COCO, COCOeval_faster
    from faster_coco_eval.core import mask

    images, annotations, results = [], [], []
    for number, (found, truth) in enumerate(pairs):
        height, width = truth["orig_size"].tolist()
        images.append({"id": number, "height": height, "width": width})
        for row in range(len(truth["boxes"])):
            shape = mask.encode(np.asfortranarray(truth["masks"][row].numpy().astype(np.uint8)))
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": int(truth["class_labels"][row])}
            entry |= {"iscrowd": int(truth["iscrowd"][row]), "area": float(truth["area"][row]), "segmentation": shape}
            annotations.append({**entry, "bbox": [0.0, 0.0, 1.0, 1.0]})
        for row, score in enumerate(found["scores"].tolist()):
            shape = mask.encode(np.asfortranarray(found["masks"][row].numpy().astype(np.uint8)))
            entry = {"image_id": number, "category_id": int(found["labels"][row]), "score": score}
            results.append({**entry, "segmentation": shape})
    truth = COCO()
    truth.dataset = {"images": images, "annotations": annotations}
    truth.dataset["categories"] = [{"id": key, "name": name} for key, name in NAMES.items()]
    truth.createIndex()
    run = COCOeval_faster(truth, truth.loadRes(results), iouType="segm")
    run.evaluate()
    run.accumulate()
    run.summarize()
    return np.asarray(run.stats[:12])


def test_scores_are_those_of_coco_files() -> None:
    pairs = [scene(size, seed) for seed, size in enumerate(SIZES)]
    made = scores(instance_statistics((found for found, _ in pairs), [truth for _, truth in pairs]))
    keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    keys += ("ar_small", "ar_medium", "ar_large")
    wanted = [value if value >= 0 else np.nan for value in of_files(pairs)]
    np.testing.assert_allclose([made[f"mask_{key}"] for key in keys], wanted, atol=1e-9)
    assert 0.05 < made["mask_ap"] < 0.95 and made["mask_ap"] != made["ap"]
    boxes = detection_statistics([found for found, _ in pairs], [truth for _, truth in pairs])
    alone = detection_scores(boxes, NAMES)
    assert {key: made[key] for key in alone} == pytest.approx(alone, nan_ok=True), "boxes are scored as ever"


def test_order_and_padding_of_batches_do_not_matter() -> None:
    pairs = [scene(size, seed) for seed, size in enumerate(SIZES)]
    whole = scores(instance_statistics((found for found, _ in pairs), [truth for _, truth in pairs]))
    parts = [
        instance_statistics((pairs[i][0] for i in rows), [pairs[i][1] for i in rows]) for rows in ([4, 1], [0, 3, 2])
    ]

    def joined(name: str, fill: float) -> Tensor:
        """As the Trainer joins batches."""
        longest = max(part[name].shape[1] for part in parts) + 3
        made = [part[name].new_full((len(part[name]), longest, *part[name].shape[2:]), fill) for part in parts]
        for target, part in zip(made, parts, strict=True):
            target[:, : part[name].shape[1]] = part[name]
        return torch.cat(made)

    again = scores({"boxes": joined("boxes", -100.0), "masks": joined("masks", -100)})
    assert again == pytest.approx(whole, abs=0, nan_ok=True)


def test_what_does_not_count_is_left_out() -> None:
    found, truth = scene(SIZES[0], 0)
    plain = scores(instance_statistics([found], [truth]))
    broken = {**found, "scores": torch.cat([found["scores"], torch.tensor([torch.nan])])}
    for key in ("labels", "boxes", "masks"):
        broken[key] = torch.cat([found[key], found[key][:1]])
    replaced = {**scene(SIZES[1], 1)[1], "image_id": torch.tensor([-1])}
    both = scores(instance_statistics([broken, scene(SIZES[1], 1)[0]], [truth, replaced]))
    assert both == pytest.approx(plain, nan_ok=True)
    outlines = torch.zeros(4, 300, dtype=torch.int64) - 100  # integers of any kind, as loaders may make of them
    for row, one in enumerate(encoded(truth["masks"].numpy())):
        outlines[row, : len(one)] = torch.tensor(list(one))
    kept = {key: value for key, value in truth.items() if key != "masks"}
    assert scores(instance_statistics([found], [{**kept, "outlines": outlines}])) == pytest.approx(plain, nan_ok=True)
    with pytest.raises(ValueError, match="shorter|longer"):
        instance_statistics([], [truth])
    assert scores(instance_statistics([], []))["mask_ap"] != 0


def test_the_slow_evaluator_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    import cankd_hf.metrics.detection as module

    pairs = [scene(size, seed) for seed, size in enumerate(SIZES[:2])]
    statistics = instance_statistics((found for found, _ in pairs), [truth for _, truth in pairs])
    fast = scores(statistics)
    monkeypatch.setattr(module, "_backend", module._slow_backend)
    assert scores(statistics) == pytest.approx(fast, abs=1e-9, nan_ok=True)
