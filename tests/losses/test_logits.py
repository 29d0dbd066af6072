"""Losses on logits: what counts (padding, erased and unsure positions), and naive versions of those of detectors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from cankd_hf.features.matching import assign
from cankd_hf.losses import LOSSES, KLLoss
from cankd_hf.losses.base import Seen

ON_POSITIONS = ["kl", "dist", "dkd"]


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True), 3 * torch.randn(shape, dtype=torch.float64)


def everything(*shape: int) -> Seen:
    return Seen(torch.ones(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))


def gradient(value: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("name", ON_POSITIONS)
def test_seeing_all_is_the_loss_without_weights(name: str) -> None:
    student, teacher = pair(2, 5, 4, 6)
    loss = LOSSES[name](5, temperature=2.0)
    torch.testing.assert_close(loss(student, teacher, weights=everything(2, 4, 6)), loss(student, teacher))


@pytest.mark.parametrize("name", ON_POSITIONS)
def test_padding_neither_teaches_nor_counts(name: str) -> None:
    student, teacher = pair(2, 5, 4, 6)
    weights = everything(2, 4, 6)
    for mask in weights:
        mask[1, :, 3:] = 0
    loss = LOSSES[name](5)
    changed = teacher.clone()
    changed[1, :, :, 3:] = 100 * torch.randn(5, 4, 3)
    value, other = loss(student, teacher, weights=weights), loss(student, changed, weights=weights)
    got, again = gradient(value, student), gradient(other, student)
    assert torch.equal(value, other) and torch.equal(got, again)
    assert not got[1, :, :, 3:].any() and got[1, :, :, :3].any()
    if name != "dist":  # the mean over what is no padding; dist correlates over all samples
        rows = [torch.cat([x[0].flatten(1), x[1, :, :, :3].flatten(1)], 1).T for x in (student, teacher)]
        torch.testing.assert_close(value, loss(*rows))


@pytest.mark.parametrize("name", ON_POSITIONS)
def test_half_the_pixels_is_half_the_loss(name: str) -> None:
    half = pair(1, 5, 4, 3)
    student, teacher = (torch.cat([x.detach(), x.detach()], 3).requires_grad_() for x in half)
    weights = everything(1, 4, 6)
    weights.seen[..., 3:] = 0  # erased
    loss = LOSSES[name](5)
    whole, erased = loss(student, teacher), loss(student, teacher, weights=weights)
    torch.testing.assert_close(erased, whole / 2)
    assert not gradient(erased, student)[..., 3:].any()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_unsure_positions_are_left_out_but_counted(activation: Any) -> None:
    student, teacher = pair(2, 3, 4, 6)
    loss, free = KLLoss(3, activation=activation, threshold=0.8), KLLoss(3, activation=activation)
    p = (teacher.softmax(1) if activation == "softmax" else teacher.sigmoid()).amax(1) >= 0.8
    assert 0.2 < p.float().mean() < 0.98
    rows = [x.movedim(1, -1)[p] for x in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher), free(*rows) * p.double().mean())
    kept = loss.report(student, teacher)
    torch.testing.assert_close(kept["kept"], p.float().mean())
    assert free.report(student, teacher) == {}


def test_what_is_kept_of_each_class_and_what_there_is() -> None:
    teacher = torch.zeros(1, 3, 2, 4)
    teacher[0, 0, 0] = teacher[0, 1, 1, :3] = 9.0  # sure of four and of three
    teacher[0, 2, 1, 3] = 0.1  # hardly so of one
    labels = torch.tensor([[[0, 0, 0, 255], [1, 1, 2, 2]]])
    told = KLLoss(3, threshold=0.9).report(teacher, teacher, labels=labels)
    assert told["kept"] == 7 / 8
    assert [told[f"kept/{k}"].item() for k in range(3)] == pytest.approx([4 / 7, 3 / 7, 0])
    assert [told[f"prior/{k}"].item() for k in range(3)] == pytest.approx([3 / 7, 2 / 7, 2 / 7])
    by_teacher = KLLoss(3, threshold=0.9).report(teacher, teacher)
    assert by_teacher["prior/2"] == 1 / 8


def test_dkd_takes_the_teacher_at_its_word_where_there_is_no_label() -> None:
    student, teacher = pair(2, 5, 4, 6)
    void = torch.full((2, 4, 6), 255)
    loss = LOSSES["dkd"](5)
    torch.testing.assert_close(loss(student, teacher, labels=void), loss(student, teacher))


def corners(*shape: int) -> Tensor:
    first = torch.rand(*shape, 2, dtype=torch.float64) * 0.5
    return torch.cat([first, first + 0.1 + torch.rand(*shape, 2, dtype=torch.float64) * 0.4], -1)


def binary(s: Tensor, t: Tensor) -> Tensor:
    p, q = s.sigmoid(), t.sigmoid()
    return torch.xlogy(q, q) - q * p.log() + torch.xlogy(1 - q, 1 - q) - (1 - q) * (1 - p).log()


def test_dense_region_with_nothing_outside() -> None:
    student, teacher = pair(1, 10, 3)
    theirs = {"boxes": corners(1, 10), "quality": torch.randn(1, 10, dtype=torch.float64)}
    given = {"boxes": corners(1, 10)}, theirs
    value = LOSSES["dense_logits"](3, region=0.2, outside="zero", boxes=0.0)(student, teacher, predictions=given)
    q = teacher.sigmoid()
    inside = (q.amax(2) * theirs["quality"].sigmoid()).topk(2).indices[0]
    target = torch.full_like(teacher, -torch.inf)
    target[0, inside] = teacher[0, inside]
    gap = (target.sigmoid() - student.sigmoid()).abs().detach()
    want = (gap * binary(student, target)).sum() / q.amax(2).sum().clamp_min(1)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(gradient(value, student), gradient(want, student))


def test_anchors_that_are_not_seen_count_for_nothing() -> None:
    student, teacher = pair(2, 10, 3)
    boxes = corners(2, 10).requires_grad_()
    weights = everything(2, 10)
    weights.seen[:, 6:] = weights.valid[:, 6:] = 0
    loss = LOSSES["dense_logits"](3, region=0.5)
    theirs = corners(2, 10)
    changed, moved = teacher.clone(), theirs.clone()
    changed[:, 6:], moved[:, 6:] = 9.0, corners(2, 4)
    value = loss(student, teacher, predictions=({"boxes": boxes}, {"boxes": theirs}), weights=weights)
    other = loss(student, changed, predictions=({"boxes": boxes}, {"boxes": moved}), weights=weights)
    found = torch.autograd.grad(value, (student, boxes))
    assert torch.equal(value, other)
    assert all(not one[:, 6:].any() and one[:, :6].any() for one in found)


def test_recall_of_the_region() -> None:
    teacher = torch.tensor([[[4.0], [3.0], [-5.0], [-6.0]]])
    boxes = torch.tensor([[[0.0, 0, 0.5, 0.5], [0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0.9, 0, 1, 0.1]]])
    labels = [{"boxes": box_convert(boxes[0, [0, 2]], "xyxy", "cxcywh")}]
    loss, given = LOSSES["dense_logits"](1, region=0.5), ({"boxes": boxes}, {"boxes": boxes})
    assert loss.report(teacher, teacher, predictions=given, labels=labels)["recall"] == 0.5
    none = [{"boxes": torch.zeros(0, 4)}]
    for labelled in (none, None):  # the same names in all processes
        assert loss.report(teacher, teacher, predictions=given, labels=labelled)["recall"].isnan()


def queries(batch: int, ours: int, theirs: int, classes: int) -> tuple[Tensor, Tensor, Any]:
    student = torch.randn(batch, ours, classes, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(batch, theirs, classes, dtype=torch.float64)
    boxes = [box_convert(corners(batch, count), "xyxy", "cxcywh") for count in (ours, theirs)]
    return student, teacher, ({"boxes": boxes[0].requires_grad_()}, {"boxes": boxes[1]})


def giou(a: Tensor, b: Tensor) -> Tensor:
    return generalized_box_iou(box_convert(a[None], "cxcywh", "xyxy"), box_convert(b[None], "cxcywh", "xyxy"))[0, 0]


def naive_query_logits(student: Tensor, teacher: Tensor, given: Any, softmax: bool, top: int) -> Tensor:
    """By the docstring, trying every matching."""
    empty = torch.full((student.shape[2],), -1e4, dtype=torch.float64)
    total, located, confident = student.new_zeros(()), student.new_zeros(()), student.new_zeros(())
    for row in range(len(student)):
        s, t, b, c = student[row], teacher[row], given[0]["boxes"][row], given[1]["boxes"][row]
        p, q = (x.softmax(-1)[:, :-1] if softmax else x.sigmoid() for x in (s, t))
        best = q.amax(1).argsort(descending=True)[:top].tolist()

        def cost(i: int, j: int, p: Tensor = p, q: Tensor = q, b: Tensor = b, c: Tensor = c) -> float:
            value = -p[i, q[j].argmax()] + 5 * (b[i] - c[j]).abs().sum() + 2 * (1 - giou(b[i], c[j]))
            return float(value.detach())

        if len(s) >= len(best):
            ways = [list(zip(one, best, strict=True)) for one in itertools.permutations(range(len(s)), len(best))]
        else:
            ways = [list(zip(range(len(s)), one, strict=True)) for one in itertools.permutations(best, len(s))]
        matched = dict(min(ways, key=lambda way: sum(cost(i, j) for i, j in way)))
        for i in range(len(s)):
            w = q[matched[i]].max() if i in matched else torch.zeros(())
            target = t[matched[i]] if i in matched else empty
            if softmax:
                target = target.clone()
                target[-1] = target[-1] if i in matched else 0
                share = target.softmax(0)
                divergence = (torch.xlogy(share, share) - share * s[i].log_softmax(0)).sum()
                total = total + (w + 0.1 * (1 - w)) * divergence
            else:
                total = total + ((target.sigmoid() - s[i].sigmoid()).abs().detach() * binary(s[i], target)).sum()
            if i in matched:
                apart, other = (b[i] - c[matched[i]]).abs().sum(), 1 - giou(b[i], c[matched[i]])
                located, confident = located + w * (5 * apart + 2 * other), confident + w
    return total / confident.clamp_min(1) + located / confident


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("ours", "theirs", "top"), [(5, 5, 9), (5, 4, 3), (3, 5, 9)])
def test_query_logits(ours: int, theirs: int, top: int, softmax: bool) -> None:
    student, teacher, given = queries(2, ours, theirs, 3)
    loss = LOSSES["query_logits"](3, top=top, activation="softmax" if softmax else "sigmoid")
    value, want = (
        loss(student, teacher, predictions=given, assign=assign),
        naive_query_logits(student, teacher, given, softmax, top),
    )
    inputs = student, given[0]["boxes"]
    found = zip(torch.autograd.grad(value, inputs), torch.autograd.grad(want, inputs), strict=True)
    torch.testing.assert_close(value, want)
    for got, expected in found:
        torch.testing.assert_close(got, expected)


def test_the_order_of_queries_does_not_matter_and_equal_sets_are_0() -> None:
    student, teacher, given = queries(2, 6, 6, 4)
    loss = LOSSES["query_logits"](4, activation="sigmoid")
    value = loss(student, teacher, predictions=given, assign=assign)
    order = torch.randperm(6)
    turned = {"boxes": given[0]["boxes"][:, order]}
    torch.testing.assert_close(loss(student[:, order], teacher, predictions=(turned, given[1]), assign=assign), value)
    itself = loss(student[:, order], student.detach(), predictions=(turned, given[0]), assign=assign)
    assert itself.abs() < 1e-6 < value


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_queries_in_the_padding_say_nothing(activation: str) -> None:
    student, teacher, given = queries(2, 6, 5, 4)
    weights = everything(2, 5)
    weights.valid[:, 3:] = 0
    loss = LOSSES["query_logits"](4, activation=activation)
    changed, moved = teacher.clone(), given[1]["boxes"].clone()
    changed[:, 3:], moved[:, 3:] = 9.0, 0.5
    value = loss(student, teacher, predictions=given, assign=assign, weights=weights)
    other = loss(student, changed, predictions=(given[0], {"boxes": moved}), assign=assign, weights=weights)
    torch.testing.assert_close(value, other)
    alone = loss(student, teacher[:, :3], predictions=(given[0], {"boxes": given[1]["boxes"][:, :3]}), assign=assign)
    torch.testing.assert_close(value, alone)


@pytest.mark.parametrize("name", ["kl", "dense_logits", "cross_head", "query_logits"])
def test_a_constant_added_to_all_logits_of_sigmoid_heads_changes_the_loss(name: str) -> None:
    student, teacher = (x.detach() for x in pair(2, 6, 4))
    options = {"activation": "sigmoid"} if "activation" in LOSSES[name].of_head else {}
    loss = LOSSES[name](4, **options)
    assert abs(loss(student + 1, teacher) - loss(student, teacher)) > 1e-2
