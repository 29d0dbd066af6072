"""What losses compare that do not read maps: logits, and the predictions of detectors at anchors and of queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.features.auto_taps import quiet_forward
from cankd_hf.features.dense import (
    CENTRES,
    dense_of,
    dense_shape,
    head_activation,
    queries_of,
    queries_shape,
    selects_detections,
)
from cankd_hf.features.grids import class_count, logits_of, resize_map
from cankd_hf.features.matching import assign
from cankd_hf.features.taps import Level
from cankd_hf.losses.base import DistillationLoss, LogitsLoss, Seen
from cankd_hf.losses.cross_head import CrossHeadLoss
from cankd_hf.losses.pseudo_boxes import PseudoBoxesLoss
from cankd_hf.teachers.teacher import TeacherOutput
from cankd_hf.training.connecting import Connected, ConnectingModule, seen_cells
from cankd_hf.training.crossing import Crossing
from cankd_hf.training.placing import Placed, TeacherShape, loss_class, reads
from cankd_hf.training.pseudo import check_boxes, told, value_of

PREDICTIONS = {"dense": "a dense detector's predictions", "queries": "a DETR-like detector's queries"}


class Answers(NamedTuple):
    """What losses on logits may read of a batch, beside the teachers' outputs."""

    student: nn.Module
    outputs: Any = None  # of the student
    logits: Tensor | None = None  # of the student
    labels: Any = None
    meta: Mapping[str, Any] = {}  # of the samples, see `Batch`
    crossings: Mapping[str, Crossing] = {}  # by label of the term


def crosses(term: LossTerm) -> bool:
    """Whether a term compares what the teacher's head makes of the student's features."""
    return loss_class(term).crosses


def check_classes(
    term: LossTerm, student: PreTrainedModel, name: str, teacher: TeacherShape, image_size: tuple[int, int]
) -> tuple[int, int]:
    """The number of classes of student and teacher, and that of the dimensions of their logits.

    Raises:
        InputError: if the numbers differ, or one has nothing to compare.
    """
    what = reads(term)
    place = f"distill.terms.{term.label}.loss: {term.loss_name} reads {PREDICTIONS.get(what, 'logits')}"
    title = "teacher" if name == "teacher" else f"teacher {name}"
    ours, theirs = "student", title
    if what == "logits" and selects_detections(student):
        kind = type(student).__name__
        raise InputError(f"{place}, and {kind} gives those of detections alone; use dense_logits or a loss on maps")
    shapes = {ours: _shape(what, student, image_size), theirs: getattr(teacher, what)}
    if crosses(term):
        shapes[ours] = None if teacher.dense is None else (1, teacher.dense[1], student.config.num_labels)
    if without := [name for name, shape in shapes.items() if shape is None]:
        why = f" ({teacher.without})" if theirs in without and teacher.without else ""
        raise InputError(f"{place}, but there are none from {' and '.join(without)}{why}; use a loss on maps")
    counts = {name: class_count(shape) for name, shape in shapes.items() if shape is not None}
    if len(set(counts.values())) > 1:
        numbers = " and ".join(f"{count} of the {name}" for name, count in counts.items())
        raise InputError(f"{place}: expected equal numbers of classes, got {numbers}; train both on the same classes")
    anchors = {name: shape[1] for name, shape in shapes.items() if shape is not None}
    if what == "dense" and len(set(anchors.values())) > 1:
        numbers = " and ".join(f"{count} of the {name}" for name, count in anchors.items())
        raise InputError(
            f"{place}: expected equal numbers of anchors, got {numbers}; give both one head and one scale, or use "
            "cross_head"
        )
    shape = shapes[ours]
    assert shape is not None
    _check_activation(term, student, teacher, head_activation(student, len(shape)), len(shape))
    return counts[ours], len(shape)


def _shape(what: str, student: PreTrainedModel, image_size: tuple[int, int]) -> Any:
    if what == "dense":
        return dense_shape(student, image_size)
    if what == "queries":
        return queries_shape(student, image_size)
    found = logits_of(quiet_forward(student, image_size))
    return None if found is None else found.shape


def _check_activation(term: LossTerm, student: nn.Module, teacher: TeacherShape, ours: str, dimensions: int) -> None:
    """Refuses a softmax for heads with a sigmoid for each class, and heads of two kinds."""
    place, cls = f"distill.terms.{term.label}", loss_class(term)
    given = term.options.get("activation", getattr(term.loss, "activation", "auto"))
    theirs = ours if teacher.source is None else head_activation(teacher.source.model, dimensions)
    if ours != theirs:
        raise InputError(
            f"{place}.loss: expected two heads of one kind, got a {ours} for the student and a {theirs} for the "
            "teacher; use a loss on maps"
        )
    softmax = (issubclass(cls, LogitsLoss) and cls.needs_softmax) or given == "softmax"
    if ours == "sigmoid" and softmax:
        raise InputError(
            f"{place}.loss: {term.loss_name} takes a softmax over the classes, and {type(student).__name__} has a "
            "sigmoid for each: their absolute scores would be lost; use query_logits, or kl"
        )


def of_head(term: LossTerm, student: nn.Module, dimensions: int) -> dict[str, Any]:
    """Options of a loss that are those of the student's head, where the term leaves them open; a loss that was given
    as a module gets them as attributes."""
    cls, found = loss_class(term), head_activation(student, dimensions)
    wanted = cls.of_head if issubclass(cls, LogitsLoss) else ()
    if not isinstance(term.loss, nn.Module):
        return {name: found for name in wanted if term.options.get(name, "auto") == "auto"}
    for name in wanted:
        if getattr(term.loss, name) == "auto":
            setattr(term.loss, name, found)
    return {}


class Compared(NamedTuple):
    """What a loss gets, and what else the batch has, see `DistillationLoss.extras`; None for what it has not."""

    student: Tensor
    teacher: Tensor
    extras: Mapping[str, Any]

    def for_loss(self, loss: nn.Module) -> dict[str, Any]:
        """The extras that a loss takes."""
        wanted = loss.extras if isinstance(loss, DistillationLoss) else ()
        return {name: self.extras[name] for name in wanted if self.extras.get(name) is not None}


def compared_logits(item: Placed, answers: Answers, output: TeacherOutput | None) -> Compared | None:
    """The student's logits and the teacher's, resized to the same grid; None if the teacher was not asked.

    Those of a loss that reads predictions are the class logits of all anchors or queries.

    Raises:
        InputError: if one gives no logits in training, or they are of other queries (some detectors add queries in
            training) and the loss does not match them.
    """
    if output is None:
        return None
    what, predictions = reads(item.term), None
    student, teacher = answers.logits, output.logits
    if what != "logits":
        predictions = _predictions(item, answers, output)
        student, teacher = (None if found is None else found["class_logits"] for found in predictions)
    if student is None or teacher is None:
        who = "student" if student is None else "teacher"
        raise InputError(f"{item.place}: reads logits, and the {who} gives none in training; take a loss on maps")
    weights = _seen(answers.meta, what, student, predictions)
    if teacher.ndim == 4:
        teacher = _resized(teacher, answers.meta.get("valid"), (student.shape[-2], student.shape[-1]))
    matches = isinstance(item.loss, DistillationLoss) and type(item.loss).check is not DistillationLoss.check
    if student.ndim == 3 and student.shape != teacher.shape and not matches:
        raise InputError(
            f"{item.place}: compares query with query, but the student gives logits {list(student.shape)} in training "
            f"and the teacher {list(teacher.shape)}; take query_logits, which matches them, or a loss on maps"
        )
    given = {"labels": answers.labels, "predictions": predictions, "weights": weights, "assign": assign}
    return Compared(student, teacher, given)


def _predictions(item: Placed, answers: Answers, output: TeacherOutput) -> tuple[Any, Any]:
    """The predictions of student and teacher at all anchors, or of all queries."""
    if isinstance(item.loss, CrossHeadLoss):
        return answers.crossings[item.term.label].predict(item.loss), output.dense
    if reads(item.term) == "dense":
        return dense_of(answers.outputs), output.dense
    ours, theirs = queries_of(answers.outputs, answers.student, answers.student.training), output.queries
    if ours is None or theirs is None:
        return ours, theirs
    groups = len(ours["boxes"]) // len(theirs["boxes"])
    return ours, {name: value.repeat_interleave(groups, 0) for name, value in theirs.items()}


def _seen(meta: Mapping[str, Any], what: str, logits: Tensor, predictions: tuple[Any, Any] | None) -> Seen | None:
    """What is seen, and what is no padding, of each position [B, h, w], anchor [B, A] or teacher's query [B, M].

    None if all is, or nothing is known. Queries, whose boxes may lie anywhere, are placed by the centre of the box.
    """
    valid, seen = meta.get("valid"), meta.get("seen")
    seen = valid if seen is None else seen
    if seen is None:
        return None
    masks = [seen, torch.ones_like(seen) if valid is None else valid]
    if logits.ndim == 4:
        return Seen(*(seen_cells(mask, (logits.shape[-2], logits.shape[-1])).float() for mask in masks))
    centres = None if predictions is None else predictions[0].get(CENTRES)
    if what == "queries" and predictions is not None:
        centres = predictions[1]["boxes"][..., :2].float()
    if centres is None:
        return None
    size = torch.tensor(seen.shape[:-3:-1]).to(centres.device, non_blocking=True)  # width and height
    x, y = (centres * size).long().clamp(min=0).minimum(size - 1).unbind(-1)
    inside = ((centres >= 0) & (centres < 1)).all(-1)
    groups = len(x) // len(seen) if x.ndim == 2 else 1
    row = torch.arange(len(seen), device=seen.device).repeat_interleave(groups)[:, None]
    return Seen(*((mask[row, y, x] & inside).float() for mask in masks))


def _resized(logits: Tensor, valid: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The teacher's logits [B, K, h, w] on another grid, to which cells that are all padding give nothing."""
    cells = (logits.shape[-2], logits.shape[-1])
    if valid is None or cells == size:
        return resize_map(logits, size)
    some = F.adaptive_max_pool2d(valid[:, None].float(), cells).to(logits.dtype)
    return resize_map(logits * some, size) / resize_map(some, size).clamp_min(1e-3)


def asked_of_student(
    student: nn.Module, teachers: Mapping[str, TeacherOutput] | None, placed: Iterable[Placed]
) -> dict[str, Any]:
    """Further inputs of the student: for its dense predictions, where a teacher's are to be compared."""
    names = {item.teacher for item in placed if reads(item.term) == "dense"}
    dense = any(output.dense is not None for name, output in (teachers or {}).items() if name in names)
    return {"output_dense": True} if dense and selects_detections(student) else {}


class PredictingModule(ConnectingModule):
    """Methods of `Distiller` that make the values of the losses, those on predictions among them."""

    student: PreTrainedModel
    levels: list[Level]
    _settings: tuple[tuple[int, int], Any, Any]
    crossings: dict[str, Crossing]  # by label of the terms that run through the teacher's head

    def forget_crossings(self) -> None:
        """Takes their hooks off the student."""
        for crossing in self.crossings.values():
            crossing.remove()
        self.crossings = {}

    def _read_predictions(self, term: LossTerm, name: str) -> tuple[int, dict[str, Any]]:
        """The number of classes that a term on logits compares, and further arguments of its loss."""
        shape = self.teachers[name]
        if reads(term) == "boxes":
            return check_boxes(term, self.student, name, shape), {}
        width, dimensions = check_classes(term, self.student, name, shape, self._settings[0])
        if not crosses(term):
            return width, of_head(term, self.student, dimensions)
        if shape.source is None:
            raise InputError(
                f"distill.terms.{term.label}.loss: {term.loss_name} runs the teacher's head; pass `source`"
            )
        channels = (level.channels for level in self.levels)
        crossing = self.crossings[term.label] = Crossing(term, self.student, shape.source, channels)
        return width, {"channels": crossing.channels}

    def answers(self, outputs: Any, labels: Any, meta: Any, maps: Sequence[Tensor], size: tuple[int, int]) -> Answers:
        """What losses on logits read of a batch, after the student's forward on images of this size."""
        for crossing in self.crossings.values():
            crossing.see(self.student, list(maps), size)
        return Answers(self.student, outputs, logits_of(outputs), labels, meta or {}, self.crossings)

    def measured(
        self, maps: Sequence[Tensor], teachers: Mapping[str, TeacherOutput], connected: Connected, answers: Answers
    ) -> dict[str, Any]:
        """What is measured in steps that are logged, by the fields of `DistillerOutput`."""
        similarity, branch_share = self.measure(maps, teachers, connected)
        plain = None if self.training else self.without_branches(connected)
        told = reports(self.placed, answers, teachers)
        return {"similarity": similarity, "branch_share": branch_share, "reports": told, "plain": plain}

    def values(
        self, connected: Connected, answers: Answers, teachers: Mapping[str, TeacherOutput]
    ) -> Iterator[tuple[Placed, Tensor]]:
        """The unweighted value [] of each loss whose teacher is given, with gradient."""
        for item in self.placed:
            if reads(item.term) == "boxes":
                if (own := value_of(answers.outputs)) is not None:
                    yield item, own
                continue
            if item.pair is None:
                found = compared_logits(item, answers, teachers.get(item.teacher))
            else:
                maps = self.compared(connected, item)
                found = None if maps is None else Compared(*maps, {"labels": answers.labels})
            if found is None:
                continue
            value = item.loss(found.student, found.teacher, **found.for_loss(item.loss))
            if value.ndim:
                name, shape = item.term.loss_name, list(value.shape)
                raise InputError(f"{item.place}: {name}: expected one number, got shape {shape}; reduce it to a mean")
            yield item, value


def reports(placed: Iterable[Placed], answers: Answers, teachers: Mapping[str, TeacherOutput]) -> dict[str, Tensor]:
    """Further numbers [] of the losses on logits, for the log: `recall/dense_logits`, `kept/kl`, `kept/kl/road`."""
    named = getattr(getattr(answers.student, "config", None), "id2label", None) or {}
    found: dict[str, Tensor] = {}
    for item in placed:
        if item.pair is not None or not isinstance(item.loss, DistillationLoss):
            continue
        if type(item.loss).report is DistillationLoss.report:
            continue
        with torch.no_grad():
            if isinstance(item.loss, PseudoBoxesLoss):
                numbers = told(item.loss, named) if answers.student.training else {}
            elif (compared := compared_logits(item, answers, teachers.get(item.teacher))) is None:
                numbers = {}
            else:
                numbers = item.loss.report(compared.student, compared.teacher, **compared.extras)
        for key, value in numbers.items():
            kind, _, label = key.partition("/")
            name = str(named.get(int(label), label)) if label else ""
            found["/".join(part for part in (kind, item.term.label, name) if part)] = value.detach().float()
    return found
