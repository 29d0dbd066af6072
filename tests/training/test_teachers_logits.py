"""The teacher's logits in training: its head under the student's features, queries, class order, padding."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ConvNextConfig, ConvNextForImageClassification, PreTrainedModel, set_seed

from cankd_hf import CanKDTrainer, LossTerm
from cankd_hf.config.student import StudentConfig
from cankd_hf.data.common.batch import META
from cankd_hf.errors import InputError
from cankd_hf.losses import KLLoss
from cankd_hf.tasks import DetectionTask
from cankd_hf.teachers.classes import class_order
from cankd_hf.teachers.load import load_teacher
from cankd_hf.training.predicting import _resized
from tests.models.detectors import detector

from .detector_trainers import NAMES, Boxed
from .native_detector_configs import config
from .test_objective import segmenter
from .tiny_trainers import Images, student, teacher, trainer


def logged(made: CanKDTrainer) -> dict[str, float]:
    """The last log line of the losses."""
    return [entry for entry in made.state.log_history if "loss" in entry][-1]


def shake(model: nn.Module) -> None:
    """Adds noise to its weights."""
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn_like(one))


HEADS = ["fcos_resnet", "retinanet_group_convnext", "reppoints_resnet"]


def trained(folder: Path, model: nn.Module, by: nn.Module, data: Any = None, **settings: Any) -> CanKDTrainer:
    """A trainer of one step of a detector with one term, `loss`, whose other keywords are its options."""
    loss, options = settings.pop("loss"), settings.pop("options", {})
    given = {"terms": [LossTerm(loss=loss, weight=1.0, options=options)], "max_steps": 1, **settings}
    given |= {"task": DetectionTask(NAMES), "per_device_train_batch_size": 4}
    return trainer(folder, data or Boxed(4, alike=True), model=model, teacher=load_teacher(by), **given)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", HEADS)
def test_the_teachers_own_features_in_its_head_are_its_own_predictions(kind: str, layer: int, tmp_path: Path) -> None:
    set_seed(0)
    twin = detector(kind, head_layers=2).eval()
    made = trained(tmp_path, copy.deepcopy(twin), twin, loss="cross_head", options={"layer": layer})
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    made.distiller.eval()  # BatchNorm, which would see other statistics
    teachers = made.source(batch)
    (item,), crossing = made.distiller.placed, made.distiller.crossings["cross_head"]
    made.distiller(batch["pixel_values"], teachers=teachers, output_dense=True)
    mine, theirs = crossing.predict(item.loss), teachers["teacher"].dense
    assert mine is not None and theirs is not None and mine.keys() - {"centres"} == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value)
    shake(made.student)
    made.distiller.train()(batch["pixel_values"], teachers=teachers, output_dense=True).loss.backward()
    assert all(one.grad is None for one in made.teacher.parameters())
    towers = [one for name, one in made.student.head.head.named_parameters() if "tower" in name or ".conv." in name]
    learnt = [one for one in towers if one.grad is not None and one.grad.any()]
    assert len(learnt) == len(towers) * layer / 2


@pytest.mark.parametrize(
    ("kind", "by", "options"),
    [
        ("fcos_resnet", "retinanet_group_convnext", {}),  # other anchors, other widths
        ("fcos_dinov2", "reppoints_resnet", {}),  # maps of other frames
        ("faster_rcnn_resnet", "fcos_resnet", {"outside": "zero"}),  # no towers
        ("rt_detr", "fcos_resnet", {"boxes": 0.0}),
    ],
)
def test_heads_of_other_kinds(kind: str, by: str, options: dict[str, Any], tmp_path: Path) -> None:
    set_seed(0)
    model = detr_like(kind) if kind == "rt_detr" else detector(kind, fpn_channels=16)
    models = model, detector(by, head_layers=2)
    named(models[1], *model.config.id2label.values())
    shake(models[1])  # the published start of a head says nothing of its features
    made = trained(tmp_path, *models, Padded(), loss="cross_head", options=options, bf16=True)
    (loss,) = (item.loss for item in made.distiller.placed)
    before = {name: value.clone() for name, value in loss.named_parameters()}
    made.train()
    found = logged(made)
    assert 0 < found["loss_cross_head"] < float("inf") and 0 <= found["recall/cross_head"] <= 1
    learnt = {name for name, value in loss.named_parameters() if not torch.equal(value, before[name])}
    assert learnt == {name for name in before if "boxes" not in name or options.get("boxes") != 0} != set()


def detr_like(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    set_seed(seed)
    return DetectionTask(NAMES).build_student(StudentConfig(config={**config(kind), **changes}))


class Padded(Boxed):
    """Of two sizes, which a batch pads."""

    def __init__(self) -> None:
        super().__init__(4)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return sample if index else {**sample, "pixel_values": sample["pixel_values"].repeat(1, 2, 2)}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("rt_detr", {"num_queries": 9}),  # of other queries, and with denoising queries
        ("deformable_detr", {}),
        ("lw_detr", {}),  # several groups of queries
        ("detr", {}),  # with a softmax and "no object"
    ],
)
def test_queries_are_matched(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    by = detr_like(kind, 1) if kind != "deformable_detr" else detr_like("rt_detr", 1)
    made = trained(tmp_path, detr_like(kind, **changes), by, Padded(), loss="query_logits")
    wanted = "softmax" if kind == "detr" else "sigmoid"
    assert made.distiller.placed[0].loss.activation == wanted
    made.train()
    found = logged(made)
    assert 0 < found["loss_query_logits"] < float("inf") and 0 < found["confidence/query_logits"] < 1


def test_a_loss_in_any_form_takes_the_activation_of_the_heads(tmp_path: Path) -> None:
    for loss in ("kl", KLLoss, KLLoss(3)):
        made = trained(tmp_path, detr_like("conditional_detr"), detr_like("conditional_detr", 1), loss=loss)
        assert made.distiller.placed[0].loss.activation == "sigmoid"
    softmax = KLLoss(3, activation="softmax")
    with pytest.raises(InputError, match="takes a softmax over the classes, and ConditionalDetrForObjectDetection"):
        trained(tmp_path, detr_like("conditional_detr"), detr_like("conditional_detr", 1), loss=softmax)


@pytest.mark.parametrize(
    ("models", "loss", "options", "said"),
    [
        (("conditional_detr", "conditional_detr"), "dist", {}, "dist takes a softmax over the classes, and Condit"),
        (("conditional_detr", "conditional_detr"), "kl", {"activation": "softmax"}, "kl takes a softmax over the cla"),
        (("conditional_detr", "fcos"), "query_logits", {}, "a DETR-like detector's queries, but .* none from teacher"),
        (("fcos", "conditional_detr"), "cross_head", {}, "predictions, but there are none from student and teacher;"),
        (("fcos", "fcos"), "cross_head", {"layer": 5}, "expected a layer that the towers of both heads have, got 5"),
        (("detr", "detr of 4"), "query_logits", {}, "equal numbers of classes, got 4 of the student and 5 of the t"),
        (("table-transformer", "fcos"), "dense_logits", {}, "predictions, but there are none from student;"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    models: tuple[str, str], loss: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    def build(kind: str) -> nn.Module:
        if kind == "fcos":
            return detector("fcos_resnet")
        if kind.endswith(" of 4"):
            return DetectionTask({**NAMES, 3: "fox"}).build_student(StudentConfig(config=config(kind.split()[0])))
        return detr_like(kind)

    with pytest.raises(InputError, match=said):
        trained(tmp_path, *map(build, models), loss=loss, options=options)


def test_a_classifier_of_images_says_why_it_has_no_logits(tmp_path: Path) -> None:
    small = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=4)
    ConvNextForImageClassification(small).save_pretrained(tmp_path / "classifier")
    by = load_teacher(tmp_path / "classifier")
    with pytest.raises(InputError, match="none from teacher .ConvNextForImageClassification is loaded as a backbone"):
        trainer(tmp_path, teacher=by, terms=[LossTerm(loss="kl")])


def named(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    model.config.id2label = dict(enumerate(names))
    return model


def test_classes_are_put_in_the_students_order(tmp_path: Path) -> None:
    order = [2, 0, 3, 1]  # where each class of the student is at the teacher
    by = segmenter().model
    turned = copy.deepcopy(by)
    with torch.no_grad():
        for value in (turned.head.classifier.weight, turned.head.classifier.bias):
            value[order] = value.clone()
    seen: list[float] = []
    for model, names in ((by, "road sky tree car"), (turned, "Sky car ROAD tree")):
        pupil = named(student(), "road", "sky", "tree", "car")
        given = named(model, *names.split())
        made = trainer(tmp_path, model=pupil, teacher=load_teacher(given), terms=[LossTerm(loss="kl")], max_steps=1)
        made.train()
        seen.append(logged(made)["loss_kl"])
    assert made.teacher is not None and made.teacher.manifest()["class_order"] == order
    assert seen[0] == pytest.approx(seen[1], rel=1e-6)


def test_class_order() -> None:
    def classes(*names: str) -> dict[int, str]:
        return dict(enumerate(names))

    assert class_order(classes("a", "b"), classes("A", "b"), None, "t") is None
    assert class_order(classes("traffic_light", "car"), classes("car", "traffic light"), None, "t") == [1, 0]
    assert class_order(classes("auto", "road"), classes("road", "car"), {"auto": "car"}, "t") == [1, 0]
    assert class_order(classes("LABEL_0", "LABEL_1"), classes("road", "car"), None, "t") is None
    with pytest.raises(InputError, match="t has the classes auto where the student has car; write .*class_map"):
        class_order(classes("auto", "road"), classes("road", "car"), None, "t")
    with pytest.raises(InputError, match="teacher.class_map: t has no class 'bus'; its classes are auto, road"):
        class_order(classes("auto", "road"), classes("road", "car"), {"bus": "car"}, "t")


class Ragged(Dataset):
    """Images of two sizes, which a batch pads."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = Images(2, 128)[index]
        return sample if index else {key: value[..., :80, :96] for key, value in sample.items()}


@pytest.mark.parametrize("name", ["kl", "dist", "dkd"])
def test_a_target_changed_in_the_padding_gives_no_gradient(name: str, tmp_path: Path) -> None:
    """The teacher is coarser than the student, so that its logits are resized."""
    by = segmenter().model
    made = trainer(
        tmp_path,
        Ragged(),
        teacher=load_teacher(by, scale=0.5),
        terms=[LossTerm(loss=name)],
        max_steps=1,
        task_weight=0.0,
    )
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    short = int((batch[META]["valid"].sum((1, 2)) < 128 * 128).nonzero())
    output = made.source(batch)["teacher"]
    assert output.logits is not None and output.logits.shape[-1] == 16
    changed = output.logits.clone()
    changed[short, :, 10:], changed[short, :, :, 12:] = 50.0, -50.0  # 80 x 96 of 128 x 128 pixels
    found = []
    for logits in (output.logits, changed):
        made.student.zero_grad()
        given = {"teacher": type(output)(output.maps, logits)}
        made.distiller.eval()(batch["pixel_values"], teachers=given, meta=batch[META]).loss.backward()
        found.append(next(made.student.parameters()).grad.clone())
    assert torch.equal(*found) and found[0].any()


def test_logits_are_resized_without_the_padding() -> None:
    logits = torch.ones(1, 2, 2, 2)
    logits[..., 1] = 1e6
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[..., :4] = True
    assert torch.allclose(_resized(logits, valid, (4, 4))[..., :2], torch.ones(()))
    assert torch.equal(_resized(logits, None, (2, 2)), logits)


def test_a_threshold_is_logged_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    by = segmenter().model
    with torch.no_grad():
        by.head.classifier.weight.zero_()
        by.head.classifier.bias.copy_(torch.tensor([9.0, 0, 0, 0]))  # sure of everything, of one class
    pupil = named(student(), "road", "sky", "tree", "car")
    terms = [LossTerm(loss="kl", options={"threshold": 0.9})]
    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, model=pupil, teacher=load_teacher(by), terms=terms)
        made.train()
    told_of = logged(made)
    assert told_of["kept/kl"] == told_of["kept/kl/road"] == 1 and told_of["kept/kl/sky"] == 0
    assert not any(key.startswith("prior") for key in told_of)
    told = [record.message for record in caplog.records if "options.threshold: class sky is 0% of" in record.message]
    assert len(told) == 1


def test_a_teacher_without_a_head_for_the_task_teaches_by_maps_beside_one_with_logits(tmp_path: Path) -> None:
    terms = [LossTerm(loss="instance_mse", teacher="bare"), LossTerm(loss="kl", teacher="full")]
    both = {"bare": teacher(), "full": segmenter()}
    made = trainer(tmp_path, teacher=None, teachers=both, terms=terms, max_steps=1)
    made.train()
    assert logged(made)["loss_kl"] > 0 and logged(made)["loss_instance_mse"] > 0
