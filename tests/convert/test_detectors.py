"""Converted detectors against OpenMMLab's conventions, re-derived: maps, boxes, scores and their selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from cankd_hf.convert.command import convert
from cankd_hf.convert.reading import read_checkpoint

from .openmmlab import WIDTHS, Naive, State, anchors, centres, decoded, filled, fpn, resnet, saved, towers
from .openmmlab import conv as conv_shapes

K, SIZE = 3, (120, 170)  # not multiples of 32: torchvision's own anchors would be elsewhere on the padded maps
COVERED = (128, 192)
DENSE = [8, 16, 32, 64, 128]
OUT = [4 * width for width in WIDTHS]


def picture(seed: int = 0) -> Tensor:
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(seed)) * 255


def theirs_and_ours(image: Tensor, mean: list[float], std: list[float], bgr: bool, model: Any) -> tuple[Tensor, Any]:
    """An image in 0..255, RGB: as OpenMMLab's model gets it, padded; and the output of ours."""
    shown = [torch.tensor(x)[:, None, None] for x in (mean, std)]
    ours = (image - shown[0]) / shown[1]
    padded = torch.zeros(1, 3, *COVERED)
    padded[0, :, : SIZE[0], : SIZE[1]] = ours.flip(0) if bgr else ours
    with torch.no_grad():
        return padded, model(pixel_values=ours[None], output_hidden_states=True)


def converted(tmp_path: Path, state: State, kind: str, style: str, **meta: Any) -> tuple[Any, Any]:
    file = saved(tmp_path / "model.pth", state, **meta)
    return convert(read_checkpoint(file, "student"), kind, style, None)


def same(output: Any, model: Any, wanted: tuple[Tensor, Tensor, Tensor], least: int = 5) -> None:
    found = model.post_process_object_detection(output, 0.0, [SIZE])[0]
    boxes, scores, labels = wanted
    assert len(scores) == len(found["scores"]) >= least
    torch.testing.assert_close(found["scores"], scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["boxes"], boxes, rtol=1e-4, atol=2e-2)
    assert found["labels"].tolist() == labels.tolist()


def selected(levels: list[tuple[Tensor, Tensor, Tensor]], overlap: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    boxes, scores, labels = (torch.cat(part) for part in zip(*levels, strict=True))
    kept = batched_nms(boxes, scores, labels, overlap)[:most]
    return boxes[kept], scores[kept], labels[kept]


def cells(x: Tensor, width: int) -> Tensor:
    """`[1, n width, H, W]` -> `[H W n, width]`."""
    return x[0].permute(1, 2, 0).reshape(-1, width)


def rated(scores: Tensor, threshold: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores `[A, K]` -> the best pairs above a threshold: scores, cells, classes."""
    values, places = scores.flatten().sort(descending=True, stable=True)
    count = min(int((values > threshold).sum()), most)
    return values[:count], places[:count] // scores.shape[1], places[:count] % scores.shape[1]


def retinanet(width: int = 16, extra: int = OUT[3]) -> State:
    shapes = [*resnet(), *fpn(width, OUT[1:], extra), *towers(("cls_convs", "reg_convs"), width, 2, False, True)]
    shapes += [
        *conv_shapes("bbox_head.retina_cls", 9 * K, width, 3),
        *conv_shapes("bbox_head.retina_reg", 36, width, 3),
    ]
    state = filled(shapes)
    state["bbox_head.retina_reg.weight"] *= 0.1
    return state


@pytest.mark.parametrize("caffe", [False, True])
def test_retinanet(caffe: bool, tmp_path: Path) -> None:
    state = retinanet()
    if caffe:
        state["backbone.conv1.weight"] /= 58  # of images that are not divided by their deviation
    model, plan = converted(tmp_path, state, "retinanet", "caffe" if caffe else "pytorch", CLASSES=("a", "b", "c"))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    mean, std = ([123.675, 116.28, 103.53], [1.0] * 3 if caffe else [58.395, 57.12, 57.375])
    assert plan.pixels == (mean, std)
    image, output = theirs_and_ours(picture(), mean, std, caffe, model)
    naive = Naive(state)
    maps = naive.neck(naive.backbone(image, caffe)[1:], "input", relu=False)
    for ours, x in zip(output.hidden_states, maps, strict=True):
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-3 if caffe else 1e-4)
    levels = []
    for x, places, stride in zip(maps, centres(maps, DENSE, 0.0), DENSE, strict=True):
        logits = naive.conv("bbox_head.retina_cls", naive.tower("cls_convs", x), padding=1)
        deltas = cells(naive.conv("bbox_head.retina_reg", naive.tower("reg_convs", x), padding=1), 4)
        scores, chosen, labels = rated(cells(logits, K).sigmoid(), 0.05, 1000)
        boxes = decoded(anchors(places, stride, 4, 3)[chosen], deltas[chosen], size=SIZE)
        levels.append((boxes, scores, labels))
    same(output, model, selected(levels, 0.5, 100))
