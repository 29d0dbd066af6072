"""The term `pseudo_boxes` of a `Distiller`: the student's own loss on the boxes that a teacher is sure of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.features.dense import head_activation, selects_detections
from cankd_hf.features.detections import detections_in
from cankd_hf.losses.pseudo_boxes import PseudoBoxesLoss
from cankd_hf.models.partly_labelled import PSEUDO, divides_alone, run_labelled
from cankd_hf.teachers.teacher import TeacherOutput
from cankd_hf.training.placing import Placed, TeacherShape

logger = logging.getLogger(__name__)


def with_boxes(read: set[str], teacher: nn.Module) -> set[str]:
    """What a teacher has to give for all that is read of it: its boxes are those of its anchors or queries."""
    if "boxes" not in read:
        return read
    return read | {"dense" if selects_detections(teacher) else "queries"}


def check_boxes(term: LossTerm, student: PreTrainedModel, name: str, teacher: TeacherShape) -> int:
    """The number of classes of student and teacher.

    Raises:
        InputError: if the numbers differ, or the teacher gives no boxes.
    """
    place = f"distill.terms.{term.label}.loss: {term.loss_name} reads the teacher's boxes"
    shape = teacher.queries if teacher.dense is None else teacher.dense
    if shape is None or teacher.source is None:
        raise InputError(
            f"{place}, but there are none from {name}; take a teacher with the head fcos, retinanet or reppoints, or "
            "a DETR-like one, or a loss on maps"
        )
    softmax = teacher.dense is None and head_activation(teacher.source.model, len(shape)) == "softmax"
    classes, ours = shape[-1] - int(softmax), student.config.num_labels
    if classes != ours:
        raise InputError(
            f"{place}: expected equal numbers of classes, got {ours} of the student and {classes} of {name}; train "
            "both on the same classes"
        )
    return int(ours)


def run_student(
    student: nn.Module,
    inputs: Mapping[str, Any],
    placed: Iterable[Placed],
    teachers: Mapping[str, TeacherOutput] | None,
) -> Any:
    """The student's output for its `inputs`; in training with a `pseudo_boxes` term also its loss on those boxes."""
    labels, item = inputs.get("labels"), _with_boxes(placed, teachers)
    if item is None or not student.training:
        return run_labelled(student, inputs)
    if not isinstance(labels, Sequence):
        raise InputError(
            f"{item.place}: expected labelled images in every batch, by which boxes are counted, and the student's "
            "own loss; set a task_weight above 0, and leave compute_loss_func out"
        )
    if any("masks" in label for label in labels if label is not None):
        raise InputError(
            f"{item.place}: gives boxes alone, and the student learns masks; write masks with `cankd label` first, or "
            "take a loss on maps"
        )
    loss, output = item.loss, (teachers or {})[item.teacher]
    assert isinstance(loss, PseudoBoxesLoss)
    chosen = loss.choose(detections_in(output.dense, output.queries, loss.size), labels)
    outputs = run_labelled(student, inputs, chosen.labels)
    part = chosen.part if divides_alone(student) else 1.0
    outputs[PSEUDO] = outputs[PSEUDO] * chosen.factor * part
    return outputs


def _with_boxes(placed: Iterable[Placed], teachers: Mapping[str, TeacherOutput] | None) -> Placed | None:
    found = (item for item in placed if isinstance(item.loss, PseudoBoxesLoss))
    return next((item for item in found if item.teacher in (teachers or {})), None)


def value_of(outputs: Any) -> Tensor | None:
    """The value [] of the term, in the student's output; None where it was not asked for."""
    return outputs.get(PSEUDO) if isinstance(outputs, Mapping) else None


def told(loss: PseudoBoxesLoss, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Numbers for the log; warns once of each class that nearly vanishes among the labels."""
    for index in loss.rare_classes():
        _warn_of(str(names.get(index, index)))
    return loss.report()


@cache
def _warn_of(name: str) -> None:
    logger.warning(
        "pseudo_boxes: %s has less than a tenth of its part of the objects among the teacher's boxes; it will be "
        "forgotten: label more images of it, or take a teacher that finds it",
        name,
    )
