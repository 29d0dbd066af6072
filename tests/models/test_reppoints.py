"""RepPoints against its equations, derived anew in loops."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cankd_hf.models.fpn import reppoints_cankd_fpn as reppoints
from cankd_hf.models.fpn.configuration_cankd_fpn import FPNConfig
from cankd_hf.models.fpn.reppoints_cankd_fpn import (
    MomentTransform,
    PointConv2d,
    RepPointsHead,
    assign_centres,
    cell_centres,
    reppoints_losses,
)
from cankd_hf.models.inherit import inherit

from .detectors import detector, pictures
from .kinds import RESNET

GRID = torch.tensor([[y, x] for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)])
STRIDES = [8.0, 16.0, 32.0]
SIZES = [(8, 12), (4, 6), (2, 3)]


def cells() -> Tensor:
    return cell_centres([torch.zeros(1, 1, *size) for size in SIZES], STRIDES)


def random_boxes(count: int, least: float = 2.0, most: float = 90.0) -> Tensor:
    """Corners within 96 x 64, of all sizes."""
    sides = least * (most / least) ** torch.rand(count, 2)
    centres = torch.rand(count, 2) * torch.tensor([96.0, 64.0])
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def test_the_defaults_are_the_published_ones() -> None:
    config = FPNConfig(backbone_config=RESNET, head="reppoints")
    assert (config.head_layers, config.norm, config.anchor_scale, config.strides) == (3, "group", 4.0, [8, 16, 32])
    assert (config.score_threshold, config.nms_threshold, config.topk_candidates) == (0.05, 0.5, 1000)
    assert (reppoints.FEATURE_GRADIENT, reppoints.MOMENT_GRADIENT, reppoints.BETA) == (0.1, 0.01, 0.11)
    assert (reppoints.INITIAL_WEIGHT, reppoints.REFINED_WEIGHT) == (0.5, 1.0)


def test_centres_of_cells() -> None:
    made = cells()
    expected = [
        (x * s, y * s, s) for (h, w), s in zip(SIZES, STRIDES, strict=True) for y in range(h) for x in range(w)
    ]
    assert made.tolist() == [list(row) for row in expected]


def test_the_moment_transform() -> None:
    transform, points = MomentTransform(), torch.randn(2, 5, 9, 2) * 3
    with torch.no_grad():
        transform.log_factor.copy_(torch.tensor([0.3, -0.2]))
    boxes = transform(points)
    for box, ys, xs in zip(boxes.reshape(-1, 4).tolist(), *points.reshape(-1, 9, 2).unbind(-1), strict=True):
        half_width = statistics.stdev(xs.tolist()) * math.exp(0.3)
        half_height = statistics.stdev(ys.tolist()) * math.exp(-0.2)
        x, y = statistics.mean(xs.tolist()), statistics.mean(ys.tolist())
        assert box == pytest.approx([x - half_width, y - half_height, x + half_width, y + half_height], abs=1e-5)
    grid = torch.tensor([[16.0, 24.0, 8.0]])
    expected = boxes[0, :1] * 8 + torch.tensor([16.0, 24.0, 16.0, 24.0])
    torch.testing.assert_close(transform.decode_single(points[0, :1], grid), expected)


def test_the_gradient_of_the_moment_transform() -> None:
    """A hundredth reaches the factors; and nine points in one place are no NaN."""
    transform, points = MomentTransform(), torch.randn(9, 2, requires_grad=True)
    (right,) = transform(points)[2:3]
    (gradient,) = torch.autograd.grad(right, transform.log_factor)
    torch.testing.assert_close(gradient, torch.stack([0.01 * points[:, 1].std(), torch.zeros(())]).detach())
    same = torch.zeros(9, 2, requires_grad=True)
    transform(same).sum().backward()
    assert torch.isfinite(same.grad).all()


def test_a_convolution_at_the_cells_of_a_plain_one_is_a_plain_one() -> None:
    conv, x = PointConv2d(4), torch.randn(2, 4, 5, 7)
    points = GRID.reshape(1, 18, 1, 1).expand(2, 18, 5, 7)
    torch.testing.assert_close(conv(x, points), F.conv2d(x, conv.weight, padding=1), rtol=1e-4, atol=1e-5)
    moved = conv(x, points + torch.tensor([0.0, 2.0] * 9).reshape(1, 18, 1, 1))  # two cells to the right
    expected = F.conv2d(F.pad(x, (1, 3, 1, 1)), conv.weight)[..., 2:]
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6)])
def test_both_ways_to_read_points_agree(size: tuple[int, int]) -> None:
    """Also outside the map, on its edge, and in their gradients; points that are NaN do not crash."""
    conv = PointConv2d(4)
    given = [torch.randn(2, 4, *size), 3 * torch.randn(2, 18, *size)]
    given[1][0] = given[1][0].round()
    results = []
    for read in (conv.by_operator, conv.by_grid_sample):
        x, points = (t.clone().requires_grad_() for t in given)
        out = read(x, points)
        away = (given[1] - given[1].round()).abs() > 0.01  # at a cell itself the slope is that of either side
        gradients = torch.autograd.grad(out.square().sum(), [x, points, conv.weight])
        results.append((out, gradients[0], gradients[1] * away, gradients[2]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert conv(given[0], torch.full_like(given[1], torch.nan)).shape == given[0].shape


def test_the_head_reads_at_its_initial_points_and_adds_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = RepPointsHead(8, 3, 1), torch.randn(2, 8, 4, 6)
    with torch.no_grad():
        head.initial_points.weight.zero_()
        head.initial_points.bias.copy_(GRID.flatten())
    logits, initial, refined = head.forward_level(x)
    classes, places = head.class_tower(x), head.point_tower(x)
    read = F.conv2d(classes, head.class_conv.weight, padding=1)
    torch.testing.assert_close(logits, head.cls_logits(F.relu(read)), rtol=1e-4, atol=1e-5)
    read = F.conv2d(places, head.refined_conv.weight, padding=1)
    shifts = head.refined_points(F.relu(read))
    torch.testing.assert_close(refined, GRID.reshape(1, 18, 1, 1) + shifts, rtol=1e-4, atol=1e-5)
    assert torch.equal(initial[1, :, 2, 3], GRID.flatten())

    with torch.no_grad():
        head.initial_points.bias.add_(0.3)  # between the cells
    gradients: list[Any] = []
    for factor in (0.1, 1.0):
        monkeypatch.setattr(reppoints, "FEATURE_GRADIENT", factor)
        logits, initial, refined = head.forward_level(x)
        wanted = [head.initial_points.bias, head.class_tower[0][0].weight]
        gradients.append(torch.autograd.grad((logits.square().sum() + refined.square().sum()), wanted))
    for tenth, whole in [(gradients[0][0], 0.1 * gradients[1][0]), (gradients[0][1], gradients[1][1])]:
        assert whole.abs().max() > 0
        torch.testing.assert_close(tenth, whole)


def naive_assignment(boxes: Tensor, cells: Tensor, scale: float) -> dict[int, int]:
    """Cell -> object, as in the paper: object after object, cell after cell."""
    taken: dict[int, tuple[float, int]] = {}
    for index, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        width, height = x1 - x0, y1 - y0
        octave = int((math.log2(width / scale) + math.log2(height / scale)) / 2)
        octave = min(max(octave, 3), 5)
        best = (math.inf, -1)
        for cell, (x, y, stride) in enumerate(cells.tolist()):
            if stride == 2**octave:
                best = min(best, (math.hypot((x - (x0 + x1) / 2) / width, (y - (y0 + y1) / 2) / height), cell))
        if best[0] < taken.get(best[1], (math.inf, -1))[0]:
            taken[best[1]] = (best[0], index)
    return {cell: index for cell, (_, index) in taken.items()}


@pytest.mark.parametrize("count", [0, 1, 5, 60])
def test_assignment_to_the_nearest_centre(count: int) -> None:
    """60 objects want some cells twice, on every level."""
    boxes, grid = random_boxes(count, most=400.0), cells()
    chosen, objects = assign_centres(boxes, grid, 4.0)
    expected = naive_assignment(boxes, grid, 4.0)
    assert dict(zip(chosen.tolist(), objects.tolist(), strict=True)) == expected
    assert len(chosen) == len(expected)
    if count == 60:
        assert len(expected) < 60 and set(grid[chosen][:, 2].tolist()) == set(STRIDES)


def test_of_two_objects_around_one_centre_the_first_gets_it() -> None:
    boxes = torch.tensor([[20.0, 12.0, 60.0, 52.0], [24.0, 16.0, 56.0, 48.0], [0.0, 0.0, 8.0, 8.0]])
    chosen, objects = assign_centres(boxes, cells(), 4.0)
    assert objects.tolist() == [2, 0] and cells()[chosen].tolist() == [[0, 0, 8], [40, 32, 8]]


def overlap(a: list[float], b: list[float]) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inner = max(width, 0) * max(height, 0)
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def naive_losses(targets: Any, logits: Tensor, initial: Tensor, refined: Tensor, cells: Tensor) -> dict[str, float]:
    """The three losses, number by number."""
    classification = init = refine = 0.0
    init_count = refine_count = 0

    def smooth(box: list[float], wanted: list[float], stride: float) -> float:
        gaps = [abs(a - b) / (4 * stride) for a, b in zip(box, wanted, strict=True)]
        return sum(g - 0.055 if g >= 0.11 else g * g / 0.22 for g in gaps)

    for target, scores, first, second in zip(targets, logits.sigmoid().tolist(), initial, refined, strict=True):
        boxes, labels, rows = target["boxes"].tolist(), target["labels"].tolist(), cells.tolist()
        pairs = naive_assignment(target["boxes"], cells, 4.0)
        init_count += max(len(pairs), 1)
        init += sum(smooth(first[cell].tolist(), boxes[i], rows[cell][2]) for cell, i in pairs.items())
        overlaps = [[overlap(box, one) for box in boxes] for one in first.tolist()]
        most = [max(column) for column in zip(*overlaps, strict=True)]
        positive = 0
        for cell, shares in enumerate(overlaps):
            best = max(shares, default=0.0)
            matched = best >= 0.5 or any(0 < s == m for s, m in zip(shares, most, strict=True))
            if matched:
                positive += 1
                refine += smooth(second[cell].tolist(), boxes[shares.index(best)], rows[cell][2])
            elif best >= 0.4:
                continue
            for k, p in enumerate(scores[cell]):
                if matched and k == labels[shares.index(best)]:
                    classification -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    classification -= 0.75 * p**2 * math.log(1 - p)
        refine_count += max(positive, 1)
    return {
        "loss_classification": classification / refine_count,
        "loss_points_init": 0.5 * init / init_count,
        "loss_points_refine": refine / refine_count,
    }


def test_the_losses() -> None:
    """Many objects, none at all, and one in an image where no initial box touches it."""
    grid = cells()
    near = torch.cat([grid[:, :2], grid[:, :2]], 1) + 4 * grid[:, 2:] * torch.tensor([-0.5, -0.5, 0.5, 0.5])
    initial = near + torch.randn(3, len(grid), 4)
    initial[2] = torch.cat([grid[:, :2] - 1, grid[:, :2] + 1], 1)
    refined, logits = initial + torch.randn_like(initial), torch.randn(3, len(grid), 2)
    boxes = [random_boxes(12, least=20.0), random_boxes(0), torch.tensor([[26.5, 18.5, 30.0, 22.0]])]
    targets = [{"boxes": b, "labels": torch.randint(0, 2, (len(b),))} for b in boxes]
    got = reppoints_losses(targets, logits, initial, refined, grid, 4.0)
    expected = naive_losses(targets, logits, initial, refined, grid)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert value > 0 and got[name].item() == pytest.approx(value, rel=1e-4), name
    # Nothing is positive in the last image, but the initial points of one cell still learn.
    alone = reppoints_losses(targets[2:], logits[2:], initial[2:], refined[2:], grid, 4.0)
    assert alone["loss_points_refine"] == 0 and alone["loss_points_init"] > 0
    background = reppoints_losses(targets[1:2], logits[2:], initial[2:], refined[2:], grid, 4.0)
    torch.testing.assert_close(alone["loss_classification"], background["loss_classification"])


def test_the_refined_loss_leaves_the_initial_boxes_alone() -> None:
    grid = cells()
    initial = (torch.cat([grid[:, :2] - 16, grid[:, :2] + 16], 1)[None]).requires_grad_()
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([0])}]
    logits = torch.zeros(1, len(grid), 1, requires_grad=True)
    losses = reppoints_losses(targets, logits, initial, initial.detach(), grid, 4.0)
    (losses["loss_classification"] + losses["loss_points_refine"]).backward()
    assert initial.grad is None and logits.grad.abs().sum() > 0


def test_a_model_that_diverged_has_a_loss_that_says_so() -> None:
    """And no crash: torchvision's operator reads outside the map's memory where an offset is NaN."""
    model = detector("reppoints_resnet")
    images, labels = pictures()
    with torch.no_grad():
        model.head.head.initial_points.bias.fill_(torch.nan)
    assert torch.isnan(model(images, labels=labels).loss)
    assert model.eval()(images).pred_boxes.shape == (2, 100, 4)


def test_the_head_is_inherited_whole() -> None:
    wide = {**RESNET, "hidden_sizes": [8, 16, 24, 32]}
    student, teacher = detector("reppoints_resnet"), detector("reppoints_resnet", backbone_config=wide)
    with torch.no_grad():
        teacher.head.box_coder.log_factor.fill_(0.5)
    _, head = inherit(student, teacher, ["neck", "head"])
    assert not head.left and "head.box_coder.log_factor" in head.copied
    assert all(torch.equal(value, teacher.head.state_dict()[key]) for key, value in student.head.state_dict().items())


@pytest.mark.gpu
def test_a_gpu_gives_the_same() -> None:
    """There torchvision's operator reads the points."""
    model = detector("reppoints_resnet")
    images, labels = pictures()
    expected = model(images, labels=labels).loss
    there = [{name: value.cuda() for name, value in one.items()} for one in labels]
    torch.testing.assert_close(model.cuda()(images.cuda(), labels=there).loss.cpu(), expected, rtol=1e-3, atol=1e-4)
