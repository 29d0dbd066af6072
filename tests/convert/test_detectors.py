"""Converted detectors against OpenMMLab's conventions, re-derived: maps, boxes, scores and their selection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, deform_conv2d, roi_align

from cankd_hf.convert.command import convert
from cankd_hf.convert.reading import read_checkpoint
from cankd_hf.models.plain_detectors import FORMS, DenseForm

from .openmmlab import (
    WIDTHS,
    Naive,
    State,
    anchors,
    centres,
    clipped,
    decoded,
    filled,
    fpn,
    linear,
    resnet,
    saved,
    towers,
)
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


def two_stage(stages: list[str], agnostic: bool, width: int = 16, hidden: int = 24) -> State:
    shapes = [*resnet(), *fpn(width, OUT, None), *conv_shapes("rpn_head.rpn_conv", width, width, 3)]
    shapes += [*conv_shapes("rpn_head.rpn_cls", 3, width, 1), *conv_shapes("rpn_head.rpn_reg", 12, width, 1)]
    for stage in stages:
        shapes += [
            *linear(f"{stage}.shared_fcs.0", hidden, width * 49),
            *linear(f"{stage}.shared_fcs.1", hidden, hidden),
        ]
        shapes += [
            *linear(f"{stage}.fc_cls", K + 1, hidden),
            *linear(f"{stage}.fc_reg", 4 if agnostic else 4 * K, hidden),
        ]
    state = filled(shapes)
    state["rpn_head.rpn_reg.weight"] *= 0.1
    return state


def mask_heads(names: list[str], width: int = 16) -> State:
    """Of Mask R-CNN: four convolutions, one that doubles the sides, a mask for each class."""
    shapes: list[Any] = []
    for name in names:
        for place in range(4):
            shapes += conv_shapes(f"{name}.convs.{place}.conv", width, width, 3)
        shapes += [(f"{name}.upsample.weight", (width, width, 2, 2)), (f"{name}.upsample.bias", (width,))]
        shapes += conv_shapes(f"{name}.conv_logits", K, width, 1)
    return filled(shapes, seed=1)


def masks(naive: Naive, name: str, maps: list[Tensor], boxes: Tensor) -> Tensor:
    """Boxes `[n, 4]` -> probabilities `[n, K, 28, 28]`."""
    x = pooled(maps, boxes, 14)
    for place in range(4):
        x = naive.conv(f"{name}.convs.{place}.conv", x, padding=1).relu()
    weight, bias = (naive.state[f"{name}.upsample.{part}"] for part in ("weight", "bias"))
    return naive.conv(f"{name}.conv_logits", F.conv_transpose2d(x, weight, bias, stride=2).relu()).sigmoid()


def proposals(naive: Naive, maps: list[Tensor]) -> Tensor:
    """MMDetection's RPN: the best thousand of each level, suppressed at 0.7 within it, the best thousand of all."""
    levels = []
    strides = [4, 8, 16, 32, 64]
    for level, (x, places) in enumerate(zip(maps, centres(maps, strides, 0.0), strict=True)):
        shared = naive.conv("rpn_head.rpn_conv", x, padding=1).relu()
        scores, chosen, _ = rated(cells(naive.conv("rpn_head.rpn_cls", shared), 1).sigmoid(), -1.0, 1000)
        deltas = cells(naive.conv("rpn_head.rpn_reg", shared), 4)[chosen]
        boxes = decoded(anchors(places, strides[level], 8, 1)[chosen], deltas, size=SIZE)
        big = (boxes[:, 2:] - boxes[:, :2]).amin(1) > 1e-3  # torchvision's, where MMDetection's is 0
        levels.append((boxes[big], scores[big], torch.full_like(chosen, level)[big]))
    return selected(levels, 0.7, 1000)[0]


def pooled(maps: list[Tensor], boxes: Tensor, side: int = 7) -> Tensor:
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (sides / 56 + 1e-6).log2().floor().clamp(0, 3).long()
    every = [roi_align(x, [boxes], side, 1 / 4 / 2**i, 0, aligned=True) for i, x in enumerate(maps[:4])]
    return torch.stack(every)[levels, torch.arange(len(boxes))]


def rated_boxes(naive: Naive, head: str, maps: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
    x = pooled(maps, boxes).flatten(1)
    for place in (0, 1):
        x = naive.linear(f"{head}.shared_fcs.{place}", x).relu()
    return naive.linear(f"{head}.fc_cls", x), naive.linear(f"{head}.fc_reg", x)


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn"])
@pytest.mark.parametrize("masked", [False, True])
def test_two_stages(kind: str, masked: bool, tmp_path: Path) -> None:
    cascade = kind == "cascade_rcnn"
    heads = [f"roi_head.bbox_head.{i}" for i in range(3)] if cascade else ["roi_head.bbox_head"]
    stds = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
    outlines = [head.replace("bbox", "mask") for head in heads] if masked else []
    state = two_stage(heads, cascade) | mask_heads(outlines)
    model, plan = converted(tmp_path, state, kind, "pytorch")
    image, output = theirs_and_ours(picture(), *plan.pixels, False, model)
    naive = Naive(state)
    maps = naive.neck(naive.backbone(image), None, relu=False)
    for ours, x in zip(output.hidden_states, maps, strict=True):
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    boxes, logits = proposals(naive, maps), []
    for head, deviations in zip(heads, stds, strict=False):
        given = boxes
        scores, deltas = rated_boxes(naive, head, maps, given)
        logits.append(scores)
        boxes = decoded(given, deltas, deviations, SIZE) if cascade else given
    probabilities = torch.stack(logits).mean(0).softmax(1)[:, :K]  # the background is the last
    one = (
        [decoded(given, deltas[:, 4 * k : 4 * k + 4], stds[0], SIZE) for k in range(K)] if not cascade else [boxes] * K
    )
    rows, labels = torch.where(probabilities > 0.05)
    found = torch.stack(one, 1)[rows, labels]
    big = (found[:, 2:] - found[:, :2]).amin(1) > 1e-2  # torchvision's
    best = selected([(found[big], probabilities[rows, labels][big], labels[big])], 0.5, 100)
    same(output, model, best)
    assert hasattr(model, "post_process_instance_segmentation") == masked
    if masked:
        rated = torch.stack([masks(naive, name, maps, best[0]) for name in outlines]).mean(0)
        wanted = rated[torch.arange(len(best[2])), best[2]]
        torch.testing.assert_close(output.pred_masks[0, : len(wanted)].sigmoid(), wanted, rtol=1e-3, atol=1e-4)
        assert wanted.std() > 0.05


def test_masks_of_another_kind_are_left_out(tmp_path: Path) -> None:
    heads = [f"roi_head.bbox_head.{i}" for i in range(3)]
    state = two_stage(heads, True) | mask_heads([head.replace("bbox", "mask") for head in heads])
    state["roi_head.mask_head.1.conv_res.conv.weight"] = torch.ones(16, 16, 1, 1)  # of Hybrid Task Cascade
    model, plan = converted(tmp_path, state, "cascade_rcnn", "pytorch")
    assert not model.config.masks and "masks: of another kind than Mask R-CNN's, left out" in plan.notes


def fcos(scales: list[float], width: int = 128) -> State:
    shapes = [*resnet(), *fpn(width, OUT[1:], width), *towers(("cls_convs", "reg_convs"), width, 1, True, False)]
    for name, out in {"conv_cls": K, "conv_reg": 4, "conv_centerness": 1}.items():
        shapes += conv_shapes(f"bbox_head.{name}", out, width, 3)
    state = filled(shapes)
    state["bbox_head.conv_cls.bias"] -= 2
    return state | {f"bbox_head.scales.{i}.scale": torch.tensor(scale) for i, scale in enumerate(scales)}


@pytest.mark.parametrize("linear_distances", [False, True])
def test_fcos(linear_distances: bool, tmp_path: Path) -> None:
    scales = [0.9, 1.1, 1.2, 0.8, 0.7]
    state = fcos(scales)
    head = f"dict(norm_on_bbox={linear_distances}, centerness_on_reg={linear_distances})"
    cfg = f"model = dict(backbone=dict(style='pytorch'), bbox_head={head})"
    model, plan = converted(tmp_path, state, "fcos", "auto", cfg=cfg)
    image, output = theirs_and_ours(picture(), *plan.pixels, False, model)
    naive = Naive(state)
    maps = naive.neck(naive.backbone(image)[1:], "output", relu=True)
    levels = []
    for level, (x, places) in enumerate(zip(maps, centres(maps, DENSE, 0.5), strict=True)):
        classes, boxes = naive.tower("cls_convs", x), naive.tower("reg_convs", x)
        raw = cells(naive.conv("bbox_head.conv_reg", boxes, padding=1), 4) * scales[level]
        distances = raw.relu() * DENSE[level] if linear_distances else raw.exp()
        quality = naive.conv("bbox_head.conv_centerness", boxes if linear_distances else classes, padding=1)
        scores, chosen, labels = rated(
            cells(naive.conv("bbox_head.conv_cls", classes, padding=1), K).sigmoid(), 0.05, 1000
        )
        corners = torch.cat([places - distances[:, :2], places + distances[:, 2:]], 1)
        corners = clipped(corners[chosen], SIZE)
        scores = scores * cells(quality, 1).sigmoid()[chosen, 0]
        levels.append((corners[keeps(corners)], scores[keeps(corners)], labels[keeps(corners)]))
    same(output, model, selected(levels, 0.5, 100))


def reppoints(width: int = 128) -> State:
    shapes = [
        *resnet(),
        *fpn(width, OUT[1:], OUT[3], True),
        *towers(("cls_convs", "reg_convs"), width, 1, True, False),
    ]
    for name in ("pts_init", "pts_refine", "cls"):
        shapes += conv_shapes(f"bbox_head.reppoints_{name}_conv", width, width, 3, name == "pts_init")
        shapes += conv_shapes(f"bbox_head.reppoints_{name}_out", K if name == "cls" else 18, width, 1)
    return filled([*shapes, ("bbox_head.moment_transfer", (2,))])


def test_reppoints(tmp_path: Path) -> None:
    state = reppoints()
    model, plan = converted(tmp_path, state, "reppoints", "pytorch")
    image, output = theirs_and_ours(picture(), *plan.pixels, False, model)
    naive = Naive(state)
    maps = naive.neck(naive.backbone(image)[1:], "input", relu=False)
    side = torch.arange(-1.0, 2.0)
    base = torch.stack([side.repeat_interleave(3), side.repeat(3)], 1).reshape(1, 18, 1, 1)  # y, x of a 3x3 kernel
    name, levels = "bbox_head.reppoints_{}", []
    for x, places, stride in zip(maps, centres(maps, DENSE, 0.0), DENSE, strict=True):
        classes, points = naive.tower("cls_convs", x), naive.tower("reg_convs", x)
        first = naive.conv(name.format("pts_init_conv"), points, padding=1).relu()
        first = naive.conv(name.format("pts_init_out"), first)

        def deformed(kind: str, y: Tensor, at: Tensor) -> Tensor:
            read = deform_conv2d(y, at - base, state[name.format(f"{kind}_conv") + ".weight"], padding=1)
            return naive.conv(name.format(f"{kind}_out"), read.relu())

        refined = cells(deformed("pts_refine", points, first) + first, 18).reshape(-1, 9, 2)
        scores, chosen, labels = rated(cells(deformed("cls", classes, first), K).sigmoid(), 0.05, 1000)
        middle = refined.mean(1).flip(1)
        half = refined.std(1).flip(1) * state["bbox_head.moment_transfer"].exp()
        corners = torch.cat([middle - half, middle + half], 1) * stride + places.repeat(1, 2)
        levels.append((clipped(corners[chosen], SIZE), scores, labels))
    same(output, model, selected([tuple(p[keeps(one[0])] for p in one) for one in levels], 0.5, 100))


def keeps(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


STATES = {
    "retinanet": retinanet,
    "fcos": lambda: fcos([1.0, 1.1, 0.9, 1.2, 0.8]),
    "reppoints": reppoints,
    "faster_rcnn": lambda: two_stage(["roi_head.bbox_head"], False),
    "cascade_rcnn": lambda: two_stage([f"roi_head.bbox_head.{i}" for i in range(3)], True),
}


@pytest.mark.parametrize("kind", STATES)
def test_the_exported_form_finds_the_same_and_it_trains(kind: str, tmp_path: Path) -> None:
    model, _ = converted(tmp_path, STATES[kind](), kind, "pytorch")
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = model.post_process_object_detection(model(pixel_values=image), 0.0)[0]
        scores, labels, boxes = (x[0] for x in FORMS.get(kind, DenseForm)(model)(image))
    count = len(found["scores"])
    assert count > 0 and (scores > 0).sum() == count
    torch.testing.assert_close(scores[:count], found["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes[:count], found["boxes"], rtol=1e-4, atol=1e-3)
    assert labels[:count].tolist() == found["labels"].tolist()
    wanted = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])}]
    model.train()(pixel_values=image, labels=wanted).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert next(model.parameters()).grad is not None
