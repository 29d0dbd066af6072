"""The rival losses against published values, or against a naive version written from their papers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cankd_hf.errors import InputError
from cankd_hf.losses import LOSSES, DistillationLoss, MaskedGenerativeLoss
from cankd_hf.losses.focal_global import foreground_mask
from cankd_hf.losses.frequency import low_basis

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
CASES = json.loads((GOLDENS / "peers.json").read_text())
NAMES = {"cwd": "channel_wise", "pkd": "pearson", "at": "attention_transfer", "dist": "dist", "kl": "kl"}


def double(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape, dtype=torch.float64)


def assert_equal(value: Tensor, want: Tensor, student: Tensor) -> None:
    """The same value to 1e-10 and the same gradient to 1e-8 of its largest entry."""
    (got,), (expected,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (value, want))
    assert abs(value.item() - want.item()) <= 1e-10 * max(1, abs(want.item()))
    assert (got - expected).abs().max() <= 1e-8 * expected.abs().max() > 0


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return load_file(GOLDENS / "peers.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_equals_published_values(case: dict[str, Any], published: dict[str, Tensor]) -> None:
    golden = {
        key: published[f"{case['name']}/{key}"].clone() for key in ("student", "teacher", "loss", "grad.student")
    }
    student = golden["student"].requires_grad_()
    if case["loss"] == "mgd_distance":
        value = MaskedGenerativeLoss(student.shape[1]).distance(student, golden["teacher"])
    else:
        options = {"temperature": case["args"]["tau"]} if case["args"] else {}
        value = LOSSES[NAMES[case["loss"]]](student.shape[1], **options)(student, golden["teacher"])
    value.backward()
    assert abs(value.item() - golden["loss"].item()) <= 1e-10
    assert (student.grad - golden["grad.student"]).abs().max() <= 1e-8 * golden["grad.student"].abs().max()


def test_pearson_on_whole_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in few operations."""
    student, teacher = double(3, 4, 5, 6)
    blockwise = LOSSES["pearson"](4)(student, teacher)
    monkeypatch.setattr("cankd_hf.losses.pearson.on_whole_maps", lambda device: True)
    assert_equal(LOSSES["pearson"](4)(student, teacher), blockwise, student)


def naive_cosine(s: Tensor, t: Tensor) -> Tensor:
    return 0.9 * (1 - F.cosine_similarity(s, t, dim=1)).mean() + 0.1 * F.smooth_l1_loss(s, t)


def naive_patch_similarity(s: Tensor, t: Tensor) -> Tensor:
    total = s.new_zeros(())
    for one, other in zip(s.flatten(2), t.flatten(2), strict=True):
        for i in range(one.shape[1]):
            ours, theirs = (
                torch.stack([F.cosine_similarity(x[:, i], x[:, j], dim=0) for j in range(x.shape[1])]) / 0.07
                for x in (one, other)
            )
            p, q = ours.softmax(0), theirs.softmax(0)
            total = total + (q * (q / p).log()).sum() / one.shape[1]
    return total / len(s)


def naive_frequency(s: Tensor, t: Tensor) -> Tensor:
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[2:]
        rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
        kept = (rows[:, None] <= 0.125) & (columns <= 0.125)  # a quarter of the highest, 0.5
        low = torch.fft.ifft2(torch.fft.fft2(x) * kept).real
        return low, x - low

    (low_s, high_s), (low_t, high_t) = split(s), split(t)
    log_s, log_t = (x.sign() * (1 + x.abs()).log() for x in (high_s, high_t))
    return ((low_s - low_t) ** 2).mean() + ((log_s - log_t) ** 2).mean()


MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda s, t: ((s - t) ** 2).mean(),
    "cosine": naive_cosine,
    "patch_similarity": naive_patch_similarity,
    "frequency": naive_frequency,
}


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 3, 7, 5)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_equals_the_equations(name: str, shape: tuple[int, ...]) -> None:
    student, teacher = double(*shape)
    assert_equal(LOSSES[name](shape[1])(student, teacher), MAPS[name](student, teacher), student)


def test_large_maps_are_compared_in_bounded_areas() -> None:
    loss, (student, teacher) = LOSSES["patch_similarity"](3, cells=20), double(2, 3, 8, 16)
    assert loss.grid(8, 16) == (3, 6) and loss.grid(4, 5) == (4, 5) and loss.grid(1, 4000) == (1, 20)
    pooled = [F.adaptive_avg_pool2d(x, (3, 6)) for x in (student, teacher)]
    assert_equal(loss(student, teacher), naive_patch_similarity(*pooled), student)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_low_pass_is_that_of_fourier(size: int) -> None:
    like = torch.zeros((), dtype=torch.float64)
    for cutoff in (0.1, 0.5, 1.0):
        kept = (torch.fft.fftfreq(size, dtype=torch.float64).abs() <= cutoff / 2).double()
        want = torch.fft.ifft(torch.fft.fft(torch.eye(size, dtype=torch.float64)) * kept).real
        basis = low_basis(size, cutoff, like)
        torch.testing.assert_close(basis @ basis.mT, want)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


def naive_generated(loss: Any, s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    first, _, last = loss.generator
    made = F.conv2d(s * mask, first.weight.double(), first.bias.double(), padding=1).relu()
    made = F.conv2d(made, last.weight.double(), last.bias.double(), padding=1)
    return 2e-5 * ((made - t) ** 2).sum() / len(s)


def test_masked_generative() -> None:
    loss, (student, teacher) = LOSSES["masked_generative"](4, mask=0.4), double(3, 4, 5, 6)
    torch.manual_seed(3)
    value = loss(student, teacher)
    torch.manual_seed(3)
    mask = (torch.rand(3, 1, 5, 6) <= 0.6).double()
    assert 0 < mask.mean() < 1 and not torch.equal(mask[0], mask[1])
    assert_equal(value, naive_generated(loss, student, teacher, mask), student)
    assert not torch.equal(value, loss(student, teacher))  # another mask
    loss.eval()
    assert torch.equal(loss(student, teacher), loss(student, teacher))


def naive_focal_global(loss: Any, s: Tensor, t: Tensor, boxes: list[Tensor] | None) -> Tensor:
    batch, channels, height, width = s.shape

    def attention(x: Tensor) -> tuple[Tensor, Tensor]:
        cells = height * width * (x.abs().mean(1).flatten(1) / 0.5).softmax(1)
        return cells.view(batch, 1, height, width), channels * (x.abs().mean((2, 3)) / 0.5).softmax(1)[..., None, None]

    def related(x: Tensor, block: nn.Module) -> Tensor:
        first, norm, _, last = block.transform
        weights = torch.einsum("oc,bchw->bohw", block.score.weight.double(), x).flatten(2).softmax(2)
        context = (x.flatten(2) * weights).sum(2)
        hidden = F.layer_norm(F.linear(context, first.weight.double(), first.bias.double()), norm.normalized_shape)
        hidden = (hidden * norm.weight.double() + norm.bias.double()).relu()
        return x + F.linear(hidden, last.weight.double(), last.bias.double())[..., None, None]

    foreground = torch.full((batch, 1, height, width), 1 / (height * width), dtype=torch.float64)
    if boxes is not None:
        foreground = naive_foreground(boxes, height, width)
    background = (foreground == 0).double()
    background = background / background.sum((1, 2, 3), keepdim=True).clamp_min(1)
    (cells_s, channels_s), (cells_t, channels_t) = attention(s), attention(t)
    squares = cells_t * channels_t * (s - t) ** 2
    value = 1e-3 * (foreground * squares).sum() + 5e-4 * (background * squares).sum()
    value = value + 1e-3 * ((cells_s - cells_t).abs().sum() + (channels_s - channels_t).abs().sum())
    return (value + 5e-6 * ((related(s, loss.context_s) - related(t, loss.context_t)) ** 2).sum()) / batch


def naive_foreground(boxes: list[Tensor], height: int, width: int) -> Tensor:
    mask = torch.zeros(len(boxes), 1, height, width, dtype=torch.float64)
    for image, of_image in zip(mask, boxes, strict=True):
        for x, y, w, h in of_image.tolist():
            left, right = int((x - w / 2) * width // 1), -int(-(x + w / 2) * width // 1)
            top, bottom = int((y - h / 2) * height // 1), -int(-(y + h / 2) * height // 1)
            share = 1 / ((right + 1 - left) * (bottom + 1 - top))
            part = image[0, max(top, 0) : bottom + 1, max(left, 0) : right + 1]
            part.clamp_min_(share)
    return mask


@pytest.mark.parametrize("with_boxes", [True, False])
def test_focal_global(with_boxes: bool) -> None:
    loss, (student, teacher) = LOSSES["focal_global"](4), double(3, 4, 7, 9)
    for part in (loss.context_s, loss.context_t):  # as after some training
        nn.init.normal_(part.transform[-1].weight)
    boxes = [torch.rand(20, 4) * 0.5 + 0.05, torch.zeros(0, 4), torch.tensor([[0.5, 0.5, 0.3, 0.1]])]
    labels = [{"boxes": one, "class_labels": torch.zeros(len(one))} for one in boxes]
    value = loss(student, teacher, labels=labels if with_boxes else torch.zeros(3, 7, 9, dtype=torch.long))
    assert_equal(value, naive_focal_global(loss, student, teacher, boxes if with_boxes else None), student)


def test_the_foreground_of_many_boxes_and_of_none() -> None:
    boxes = [torch.rand(40, 4) * 0.6 + 0.1, torch.rand(3, 4)]
    torch.testing.assert_close(
        foreground_mask(boxes, 11, 6, torch.float64).view(2, 1, 11, 6), naive_foreground(boxes, 11, 6)
    )
    assert not foreground_mask([torch.zeros(0, 4)] * 2, 3, 4).any()


def naive_dkd(s: Tensor, t: Tensor, target: Tensor, temperature: float = 2.0) -> Tensor:
    """Of one row [K] of logits."""
    others = [k for k in range(len(s)) if k != target]
    p, q = (s / temperature).softmax(0), (t / temperature).softmax(0)
    binary = [(q[target], p[target]), (q[others].sum(), p[others].sum())]
    tckd = sum(theirs * (theirs / ours).log() for theirs, ours in binary)
    p, q = p[others] / p[others].sum(), q[others] / q[others].sum()
    return temperature**2 * (tckd + 8 * (q * (q / p).log()).sum())


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 4), (2, 6, 5)], ids=str)
def test_dkd(shape: tuple[int, ...], labelled: bool) -> None:
    student, teacher = double(*shape)
    dim = 2 if len(shape) == 3 else 1
    target, labels = teacher.argmax(dim), None
    if labelled and len(shape) != 3:
        target = torch.randint(0, 5, target.shape)
        target[0] = 255  # void: what the teacher says
        labels = target if len(shape) == 2 else target.repeat_interleave(2, 1).repeat_interleave(2, 2)
        target = torch.where(target == 255, teacher.argmax(dim), target)
    rows = [x.movedim(dim, -1).reshape(-1, 5) for x in (student, teacher)]
    each = [naive_dkd(s, t, k) for s, t, k in zip(*rows, target.flatten(), strict=True)]
    value = LOSSES["dkd"](5, temperature=2.0)(student, teacher, labels=labels)
    assert_equal(value, torch.stack(each).mean(), student)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 6, 5)], ids=str)
def test_kl_and_dist_of_other_layouts(shape: tuple[int, ...]) -> None:
    """Positions are samples of the batch: the same as their rows [positions, K]."""
    student, teacher = double(*shape)
    rows = [x.movedim(2 if len(shape) == 3 else 1, -1).reshape(-1, 5) for x in (student, teacher)]
    for name in ("kl", "dist"):
        loss = LOSSES[name](5, temperature=3.0)
        assert_equal(loss(student, teacher), loss(*rows), student)


def test_kl_of_independent_classes() -> None:
    student, teacher = double(2, 6, 1)
    p, q = (student / 2).sigmoid(), (teacher / 2).sigmoid()
    want = 4 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    assert_equal(LOSSES["kl"](1, temperature=2.0, activation="sigmoid")(student, teacher), want, student)
    assert LOSSES["kl"](1, activation="sigmoid")(student + 1, student.detach()).item() > 1e-3
    for name in ("kl", "dist", "dkd"):
        with pytest.raises(InputError, match="num_labels: expected at least 2, got 1: .* `activation: sigmoid`"):
            LOSSES[name](1)


def corners(*shape: int) -> Tensor:
    first = torch.rand(*shape, 2, dtype=torch.float64) * 0.5
    return torch.cat([first, first + 0.1 + torch.rand(*shape, 2, dtype=torch.float64) * 0.4], -1)


def naive_giou(a: Tensor, b: Tensor) -> Tensor:
    def area(first: Tensor, last: Tensor) -> Tensor:
        return (last - first).clamp_min(0).prod(-1)

    shared = area(torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:]))
    union = area(a[:2], a[2:]) + area(b[:2], b[2:]) - shared
    hull = area(torch.minimum(a[:2], b[:2]), torch.maximum(a[2:], b[2:]))
    return shared / union - (hull - union) / hull


@pytest.mark.parametrize("centred", [True, False])
def test_dense_logits(centred: bool) -> None:
    student, teacher = double(2, 12, 3)
    boxes, theirs = corners(2, 12).requires_grad_(), corners(2, 12)
    quality, of_teacher = double(2, 12)
    given = {"boxes": boxes, "quality": quality}, {"boxes": theirs, "quality": of_teacher}
    if not centred:
        given = {"boxes": boxes}, {"boxes": theirs}
    value = LOSSES["dense_logits"](3, boxes=2.0, region=0.3)(student, teacher, predictions=given)

    p, q = student.sigmoid(), teacher.sigmoid()
    binary = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    classes = ((q - p).abs().detach() * binary).sum() / q.amax(2).sum()
    rank, total, located = q.amax(2) * (of_teacher.sigmoid() if centred else 1), 0.0, 0.0
    for image in range(2):
        for anchor in rank[image].argsort(descending=True)[:4]:  # 0.3 of 12, rounded up
            at = image, anchor
            one = 1 - naive_giou(boxes[at], theirs[at])
            if centred:
                c, d = quality[at].sigmoid(), of_teacher[at].sigmoid()
                one = one + d * (d / c).log() + (1 - d) * ((1 - d) / (1 - c)).log()
            total, located = total + rank[at], located + rank[at] * one
    want = classes + 2 * located / total
    assert_equal(value, want, student)
    assert_equal(value, want, boxes)
    if centred:
        assert_equal(value, want, quality)


EDGES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "both 0": lambda: (torch.zeros(2, 8, 6, 5), torch.zeros(2, 8, 6, 5)),
    "student 0": lambda: (torch.zeros(2, 8, 6, 5), torch.randn(2, 8, 6, 5)),
    "teacher 0": lambda: (torch.randn(2, 8, 6, 5), torch.zeros(2, 8, 6, 5)),
    "constant": lambda: (torch.full((2, 8, 6, 5), 3.0), torch.full((2, 8, 6, 5), -2.0)),
    "one image, one cell": lambda: (torch.randn(1, 8, 1, 1), torch.randn(1, 8, 1, 1)),
    "large": lambda: (1e4 * torch.randn(2, 8, 6, 5), 1e4 * torch.randn(2, 8, 6, 5)),
    "fp16, student 0": lambda: (torch.zeros(2, 8, 6, 5).half(), torch.randn(2, 8, 6, 5).half()),
    "bf16, constant": lambda: (torch.ones(2, 8, 6, 5).bfloat16(), torch.randn(2, 8, 6, 5).bfloat16()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_finite_at_the_edges(name: str) -> None:
    for edge, make in EDGES.items():
        loss: DistillationLoss = LOSSES[name](8)
        student, teacher = make()
        value = loss(student.requires_grad_(), teacher)
        value.backward()
        assert value.isfinite() and student.grad is not None and student.grad.isfinite().all(), edge
        assert all(part.grad is not None and part.grad.isfinite().all() for part in loss.parameters()), edge


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cosine", {"cosine": -1.0, "smooth_l1": "x"}, "CosineLoss.cosine: expected a number of at least 0, got -1.0"),
        ("channel_wise", {"temperature": 0}, "ChannelWiseLoss.temperature: expected a number above 0, got 0"),
        ("masked_generative", {"mask": 1.5}, "MaskedGenerativeLoss.mask: expected a number above 0, at most 1"),
        ("masked_generative", {"alpha": float("nan")}, "alpha: expected a number above 0, got nan"),
        ("focal_global", {"gamma": float("inf")}, "FocalGlobalLoss.gamma: expected a number of at least 0, got inf"),
        ("patch_similarity", {"cells": 1}, "PatchSimilarityLoss.cells: expected at least 2, got 1"),
        ("frequency", {"cutoff": 0}, "FrequencyLoss.cutoff"),
        ("kl", {"activation": "relu"}, "KLLoss.activation: expected auto or softmax or sigmoid, got 'relu'"),
        ("dist", {"temperature": -1}, "DistLoss.temperature"),
        ("dkd", {"beta": -1}, "DKDLoss.beta"),
        ("dense_logits", {"region": 0}, "DenseLogitsLoss.region"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        LOSSES[name](8, **options)
    assert any(said in problem for problem in caught.value.problems)
    assert len(caught.value.problems) == len(options)


def test_every_loss_names_its_paper() -> None:
    for name, loss in LOSSES.items():
        assert loss.paper and loss.citation.startswith("@"), name
    assert len({loss.citation for loss in LOSSES.values()}) >= len(LOSSES) - 2  # two are controls of other ones
