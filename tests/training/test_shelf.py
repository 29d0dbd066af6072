"""Every loss in a training step of each task, and what a loss refuses by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.ops import box_convert
from transformers import ConvNextBackbone, ConvNextConfig, set_seed

from cankd_hf import CanKDConfig, CanKDTrainer, LossTerm
from cankd_hf.errors import InputError
from cankd_hf.losses import LOSSES
from cankd_hf.tasks import DetectionTask
from cankd_hf.teachers.load import load_teacher
from tests.models.detectors import detector as any_detector

from .detector_trainers import NAMES, STUDENTS, Boxed
from .test_objective import losses, segmenter
from .tiny_trainers import Images, student, teacher, trainer

BY_TASK = {
    "segmentation": [name for name, loss in LOSSES.items() if loss.reads in ("maps", "logits")],
    "detection": [name for name, loss in LOSSES.items() if loss.reads in ("maps", "dense")],
    "queries": [name for name, loss in LOSSES.items() if loss.reads == "queries" or name == "kl"],
    "features": [name for name, loss in LOSSES.items() if loss.reads == "maps"],
}
CASES = [(task, name) for task, names in BY_TASK.items() for name in names]


def backbone() -> ConvNextBackbone:
    set_seed(0)
    return ConvNextBackbone(ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_indices=[3, 4]))


def detector(kind: str, seed: int = 0, classes: int = 3) -> nn.Module:
    set_seed(seed)
    return DetectionTask(dict(list({**NAMES, 3: "fox"}.items())[:classes])).build_student(
        copy.deepcopy(STUDENTS[kind])
    )


def with_terms(task: str, folder: Path, names: list[str]) -> CanKDTrainer:
    """A trainer of one step with a term for each loss; maps of one level are compared."""
    level = 0 if task == "detection" else -1
    terms = [
        LossTerm(loss=name, weight=1.0, **({"pairs": [[level, level]]} if LOSSES[name].reads == "maps" else {}))
        for name in names
    ]
    settings: dict[str, Any] = {"terms": terms, "max_steps": 1, "per_device_train_batch_size": 4}
    if task == "segmentation":
        return trainer(folder, Images(4), teacher=segmenter(), **settings)
    if task in ("detection", "queries"):
        kind = "fcos" if task == "detection" else "conditional_detr"
        models = {"model": detector(kind), "teacher": load_teacher(detector(kind, seed=5))}
        return trainer(folder, Boxed(4, alike=True), task=DetectionTask(NAMES), **models, **settings)
    images = [{"pixel_values": Images(4)[i]["pixel_values"]} for i in range(4)]
    return trainer(folder, images, model=backbone(), task_weight=0.0, **settings)


@pytest.fixture(scope="module", params=BY_TASK)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A task, the gradient of each loss in the student's first parameter, and the log of one step of training."""
    made = with_terms(request.param, tmp_path_factory.mktemp(request.param), BY_TASK[request.param])
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    distiller = made.distiller.train()
    first = next(one for one in distiller.student.parameters() if one.requires_grad)
    outputs = made.source(batch)
    dense = {"output_dense": True} if outputs["teacher"].dense is not None else {}
    found = distiller.student(pixel_values=batch["pixel_values"], **distiller.taps.forward_kwargs, **dense)
    size = tuple(batch["pixel_values"].shape[-2:])
    maps = distiller.taps.collect(size)
    answers = distiller.answers(found, batch.get("labels"), {}, maps, size)
    values = distiller.values(distiller.connect(maps, outputs), answers, outputs)
    gradients = {item.term.label: torch.autograd.grad(value, first, retain_graph=True)[0] for item, value in values}
    before = first.detach().clone()
    made.train()
    assert not torch.equal(before, first)
    return request.param, gradients, losses(made)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_student_of_every_task(step: tuple[str, Any, Any], name: str) -> None:
    task, gradients, logged = step
    if name not in BY_TASK[task]:
        assert name not in gradients
        return
    assert gradients[name].isfinite().all() and gradients[name].any()
    assert 0 < logged[f"loss_{name}"] < float("inf")


@pytest.mark.parametrize("name", ["kl", "dist", "dkd"])
def test_losses_on_logits_refuse_other_classes_and_models_without_logits(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name} reads logits: expected equal .*4 of the student and 7 of the teach"):
        trainer(tmp_path, teacher=segmenter(labels=7), terms=[LossTerm(loss=name)])
    with pytest.raises(InputError, match=f"{name} reads logits, but there are none from teacher; use a loss on maps"):
        trainer(tmp_path, terms=[LossTerm(loss=name)])
    images = [{"pixel_values": Images(1)[0]["pixel_values"]}]
    with pytest.raises(InputError, match=f"{name} reads logits, but there are none from student and teacher;"):
        trainer(tmp_path, images, model=backbone(), task_weight=0.0, terms=[LossTerm(loss=name)])


def test_logits_of_detections_are_refused_before_training(tmp_path: Path) -> None:
    models = {"model": detector("fcos"), "teacher": load_teacher(detector("fcos", seed=5))}
    with pytest.raises(InputError, match="kl reads logits, and FPNForObjectDetection gives those of detections alone"):
        trainer(tmp_path, Boxed(4), task=DetectionTask(NAMES), terms=[LossTerm(loss="kl")], **models)


@pytest.mark.parametrize(
    ("student_kind", "teacher_kind", "classes", "said"),
    [
        ("fcos", "fcos", 4, "expected equal numbers of classes, got 3 of the student and 4 of the teacher"),
        ("fcos", "retinanet", 3, r"expected equal numbers of anchors, got \d+ of the student and \d+ of the teacher"),
        ("fcos", "conditional_detr", 3, "a dense detector's predictions, but there are none from teacher"),
    ],
)
def test_dense_logits_refuse_other_heads(
    student_kind: str, teacher_kind: str, classes: int, said: str, tmp_path: Path
) -> None:
    made = detector(teacher_kind, classes=classes)
    with pytest.raises(InputError, match=f"distill.terms.dense_logits.loss: .*{said}"):
        trainer(
            tmp_path,
            Boxed(4),
            model=detector(student_kind),
            teacher=load_teacher(made),
            task=DetectionTask(NAMES),
            terms=[LossTerm(loss="dense_logits")],
        )


def test_dense_logits_of_a_segmenter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dense_logits reads a dense detector's .* none from student and teacher;"):
        trainer(tmp_path, model=student(), teacher=teacher(), terms=[LossTerm(loss="dense_logits")])


@pytest.mark.parametrize("kind", ["fcos_resnet", "retinanet_resnet", "reppoints_resnet", "fcos_dinov2"])
def test_dense_predictions_are_those_that_detections_are_made_of(kind: str) -> None:
    set_seed(0)
    model = any_detector(kind, score_threshold=0.0).eval()
    images = torch.randn(2, 3, 70, 96)
    with torch.no_grad():
        dense = model(images, output_dense=True).dense
        whole = model(images)
    assert model(images).dense is None and dense["boxes"].shape[:2] == dense["class_logits"].shape[:2]
    scores = dense["class_logits"].sigmoid().amax(-1)
    if kind.startswith("fcos"):
        scores = (scores * dense["quality"].sigmoid()).sqrt()
    best = whole.logits.sigmoid().amax(-1)[:, 0]
    torch.testing.assert_close(best, scores.amax(1), rtol=1e-4, atol=1e-4)
    row = dense["boxes"][0, scores[0].argmax()].clamp(0, 1)
    found = box_convert(whole.pred_boxes[0, 0], "cxcywh", "xyxy")
    torch.testing.assert_close(found, row, rtol=1e-3, atol=1e-3)


def test_labels_reach_a_loss_beside_a_loss_function_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def compute(self: Any, ours: torch.Tensor, theirs: torch.Tensor, labels: Any = None) -> torch.Tensor:
        seen.append(labels)
        return (ours - theirs).square().mean()

    def own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.square().mean()

    monkeypatch.setattr(LOSSES["dkd"], "compute", compute)
    args = CanKDConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True)
    given = {"terms": [LossTerm(loss="dkd")], "train_dataset": Images(4), "compute_loss_func": own}
    made = CanKDTrainer(student(), segmenter(), args, **given)
    made.train()
    assert [labels.shape for labels in seen] == [(4, 64, 64)]
    assert made.label_names == ["labels"]
