"""The light mask branch of FCOS, re-derived naively."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder
from transformers import set_seed

from cankd_hf import CanKDConfig, CanKDTrainer
from cankd_hf.config.distill import LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.errors import InputError
from cankd_hf.models.fpn.conventions_cankd_fpn import select_rated
from cankd_hf.models.fpn.prototypes_cankd_fpn import MOST, PROTOTYPES, SIDE, WEIGHT, PrototypeMasks
from tests.instances.kinds import CONVNEXT, generated


def read(maps: Tensor, box: Tensor, scale: float) -> Tensor:
    """Maps [P, h, w] on a grid of `SIDE` cells in a box within them, each the mean of 2 x 2 samples."""
    left, top, right, bottom = (box * scale).tolist()
    steps = (torch.arange(2 * SIDE) + 0.5) / (2 * SIDE)
    y, x = top + steps * (bottom - top), left + steps * (right - left)
    height, width = maps.shape[-2:]
    grid = torch.stack(torch.meshgrid(2 * y / height - 1, 2 * x / width - 1, indexing="ij")[::-1], -1)
    sampled = F.grid_sample(maps[None], grid[None], align_corners=False, padding_mode="border")
    return F.avg_pool2d(sampled, 2)[0]


def branch(stride: float = 8) -> PrototypeMasks:
    set_seed(0)
    return PrototypeMasks(16, stride)


def objects(*boxes: list[float]) -> dict[str, Tensor]:
    masks = torch.rand(len(boxes), 64, 96) > 0.5
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "masks": masks}


def test_the_loss_is_the_published_one() -> None:
    masks = branch()
    targets = [objects([8, 8, 40, 50], [30.5, 20, 90, 60]), objects(), objects([50, 4, 70, 30])]
    prototypes = masks.prototypes(torch.randn(3, 16, 8, 12))
    assert prototypes.shape == (3, PROTOTYPES, 16, 24) and prototypes.min() >= 0
    coefficients = torch.randn(3, 126, PROTOTYPES).tanh()
    matches = [torch.full((126,), -1) for _ in targets]
    matches[0][[3, 4, 50, 120]] = torch.tensor([0, 0, 1, 1])
    matches[2][::1] = 0  # more cells than are read
    terms = []
    for image, cell in [(0, 3), (0, 4), (0, 50), (0, 120), *((2, cell) for cell in range(0, 126, 2))]:
        thing = int(matches[image][cell])
        box, mask = targets[image]["boxes"][thing], targets[image]["masks"][thing]
        weighted = (coefficients[image, cell][:, None, None] * read(prototypes[image], box, 2 / 8)).sum(0)
        wanted, probability = read(mask[None].float(), box, 1)[0], weighted.sigmoid()
        each = -(wanted * probability.log() + (1 - wanted) * (1 - probability).log())
        terms.append(each.mean())
    assert len(terms) - 4 <= MOST
    expected = WEIGHT * torch.stack(terms).mean()
    torch.testing.assert_close(masks.loss(targets, prototypes, coefficients, matches), expected, rtol=1e-4, atol=1e-5)


def test_masks_are_sums_of_prototypes_within_the_boxes() -> None:
    masks = branch(16)
    prototypes = masks.prototypes(torch.randn(1, 16, 6, 6))[0]
    boxes, coefficients = torch.tensor([[8.0, 8, 40, 50], [30.5, 20, 90, 60]]), torch.randn(2, PROTOTYPES)
    found = masks.masks(prototypes, coefficients, boxes)
    for mask, vector, box in zip(found, coefficients, boxes, strict=True):
        torch.testing.assert_close(mask, torch.einsum("p,pyx->yx", vector, read(prototypes, box, 2 / 16)))
    assert masks.masks(prototypes, coefficients[:0], boxes[:0]).shape == (0, SIDE, SIDE)


def test_without_objects_the_loss_is_nothing_with_a_gradient() -> None:
    masks = branch()
    prototypes = masks.prototypes(torch.randn(2, 16, 8, 12))
    coefficients = masks.coefficients(torch.randn(2, 16, 8, 12)).flatten(2).transpose(1, 2)
    loss = masks.loss([objects(), objects()], prototypes, coefficients, [torch.full((96,), -1)] * 2)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in masks.parameters())


def test_the_selection_is_that_of_torchvision() -> None:
    set_seed(0)
    anchors = [torch.tensor([[x, y, x + 8, y + 8] for y in range(0, 64, 8) for x in range(0, 96, 8)]).float()]
    outputs = {"cls_logits": torch.randn(96, 3), "bbox_regression": torch.rand(96, 4) * 3}
    outputs["bbox_ctrness"] = torch.randn(96, 1)
    head = FCOS.__new__(FCOS)
    torch.nn.Module.__init__(head)
    head.box_coder = BoxLinearCoder(normalize_by_size=True)
    head.score_thresh, head.topk_candidates, head.nms_thresh, head.detections_per_img = 0.4, 50, 0.5, 20
    (expected,) = FCOS.postprocess_detections(
        head, {name: [value[None]] for name, value in outputs.items()}, [anchors], [(64, 96)]
    )
    limits = (0.4, 50, 0.5, 20)
    found = select_rated(
        {name: [value] for name, value in outputs.items()}, anchors, (64, 96), head.box_coder.decode, limits, False
    )
    assert 5 < len(expected["scores"]) <= 20
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    rated = (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()
    torch.testing.assert_close(rated[found["cells"], found["labels"]], found["scores"])


def test_predictions_are_distilled_as_without_masks(tmp_path: Path) -> None:
    """Maps, predictions at all anchors, and the student's features through the teacher's head."""
    task, data = generated()
    fpn = {"head": "fcos", "masks": True, "head_layers": 1, "fpn_channels": 8}
    set_seed(0)
    teacher, student = (
        task.build_student(StudentConfig(backbone=CONVNEXT, fpn={**fpn, "fpn_channels": width})) for width in (12, 8)
    )
    before = {name: value.clone() for name, value in student.state_dict().items()}
    settings: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    args = CanKDConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=4, **settings)
    names = ("cankd", "dense_logits", "cross_head")
    terms = [LossTerm(name) for name in names]
    trainer = CanKDTrainer(
        student, teacher, args, terms=terms, task=task, train_dataset=data.train, eval_dataset=data.eval
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert all(logged[f"loss_{name}"] > 0 for name in ("task", *names)) and math.isfinite(logged["loss"])
    assert math.isfinite(trainer.evaluate()["eval_mask_ap"])
    moved = {name for name, value in trainer.student.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"head.head.masks.{part}.weight" for part in ("prototype", "coefficient")} <= moved
    with pytest.raises(InputError, match=r"pseudo_boxes.*gives boxes alone, and the student learns masks"):
        CanKDTrainer(
            student, teacher, args, terms=[LossTerm("pseudo_boxes")], task=task, train_dataset=data.train
        ).train()
