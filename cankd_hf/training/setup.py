"""Checks and defaults of the trainer's arguments, before any module is built."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from cankd_hf.config.advice import nearest
from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.features.inputs import IMAGENET_MEAN, IMAGENET_STD
from cankd_hf.teachers.load import TeacherLike
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig, as_config
from cankd_hf.training.batchnorm import allow_single_values
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.layout import channels_last
from cankd_hf.training.objective import Objective
from cankd_hf.training.placing import TeacherShape, reads
from cankd_hf.training.pseudo import with_boxes

# Arguments of `transformers.Trainer` after `model` and `args`, in their order there.
STOCK = [name for name in inspect.signature(Trainer.__init__).parameters if name not in ("self", "model", "args")]


def sorted_out(
    teacher: Any, args: Any, others: Sequence[Any], named: Mapping[str, Any]
) -> tuple[TeacherLike | None, CanKDConfig, dict[str, Any]]:
    """The teacher, the training arguments and the Trainer's further arguments by name.

    Positional arguments may also be in the Trainer's order, `(model, args, data_collator, ...)`: where the second one
    is a `TrainingArguments`, there is no positional teacher.

    Raises:
        InputError: for an argument that is unknown, given twice, or of the wrong kind.
    """
    if unknown := [name for name in named if name not in STOCK]:
        raise InputError([f"{name}: not an argument of CanKDTrainer; {nearest(name, STOCK)}" for name in unknown])
    if isinstance(teacher, TrainingArguments):
        others = others if args is None and not others else [args, *others]
        if isinstance(args, TrainingArguments):
            raise InputError("args: given twice, once in the teacher's place; name it: teacher=..., args=...")
        teacher, args = None, teacher
    elif others:
        raise InputError(
            "CanKDTrainer: expected at most model, teacher and args without a name, "
            f"got {3 + len(others)}; name the others: train_dataset=..."
        )
    if len(others) > len(STOCK):
        raise InputError(f"CanKDTrainer: expected at most {2 + len(STOCK)} arguments, got {2 + len(others)}")
    placed = dict(zip(STOCK, others, strict=False))
    if twice := [name for name in placed if name in named]:
        raise InputError(f"{twice[0]}: given twice, with and without its name; give it once")
    args = CanKDConfig("cankd_output") if args is None else args
    if not isinstance(args, TrainingArguments):
        raise InputError(f"args: expected a cankd_hf.CanKDConfig, got {type(args).__name__}; it has the same settings")
    return teacher, as_config(args), {**placed, **named}


def check_stock(args: CanKDConfig, model: Any, stock: Mapping[str, Any], task_weight: float) -> None:
    """Raises `InputError` for arguments of the Trainer that contradict each other or settings of ours."""
    optimizer, scheduler = stock.get("optimizers") or (None, None)
    problems = []
    if (model is None) == (stock.get("model_init") is None):
        given = "neither" if model is None else "both"
        problems.append(f"model: expected a student or a model_init, got {given}; give one of them")
    if stock.get("model_init") is not None and (optimizer is not None or scheduler is not None):
        problems.append(
            "optimizers: model_init makes new weights, which a given optimizer does not have; leave it out"
        )
    if optimizer is not None and args.backbone_lr_scale != 1.0:
        problems.append(
            "training.backbone_lr_scale: the given optimizer has rates of its own; set the backbone's there"
        )
    if scheduler is not None and args.lr_drops:
        problems.append("training.lr_drops: a scheduler is given in optimizers; leave out one of the two")
    if stock.get("compute_loss_func") is not None and task_weight == 0:
        problems.append("compute_loss_func: it is the task's loss, whose task_weight is 0; leave one of the two out")
    if problems:
        raise InputError(problems)


def named_teachers(teacher: TeacherLike | None, teachers: Mapping[str, TeacherLike] | None) -> dict[str, TeacherLike]:
    """All teachers by name; the one of `teacher=` is called `teacher`."""
    if teacher is not None and teachers:
        raise InputError("teachers: expected teacher or teachers, got both; pass all of them in teachers")
    if teacher is not None:
        return {"teacher": teacher}
    wrong = [name for name in teachers or {} if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name)]
    if wrong:
        raise InputError(
            f"teachers: expected a letter or _, then letters, digits, _ and -, got {', '.join(map(repr, wrong))}"
        )
    return dict(teachers or {})


def check_objective(
    args: CanKDConfig,
    teachers: Mapping[str, TeacherLike],
    terms: Sequence[LossTerm] | None,
    task_weight: float,
    objective: Objective | None,
) -> Objective:
    """Raises InputError for arguments that cannot train; returns the objective, with the default term filled in."""
    if args.n_gpu > 1:
        raise InputError(
            f"launch: {args.n_gpu} GPUs are visible to one process, which would train with DataParallel; "
            "use `accelerate launch -m cankd_hf.train ...` or make one GPU visible with CUDA_VISIBLE_DEVICES"
        )
    if objective is not None and (terms is not None or task_weight != 1.0):
        raise InputError("objective: expected terms and task_weight in it, got separate ones; leave them out")
    if terms is None and len(teachers) > 1 and objective is None:
        raise InputError(f"terms: expected one or more for the teachers {', '.join(teachers)}, got none; pass terms")
    if objective is None:
        objective = Objective(task_weight, terms if terms is not None else [LossTerm()] if teachers else [])
    if not teachers and objective.terms:
        raise InputError("teacher: expected one for the given terms, got none; pass one or leave the terms out")
    return objective


def check_asked(teachers: Mapping[str, Teacher], objective: Objective) -> None:
    """Raises InputError if there are steps in which nothing is learnt."""
    if objective.task_weight == 0 and teachers and all(one.config.every > 1 for one in teachers.values()):
        raise InputError("teacher.every: expected 1 with task_weight 0, which leaves nothing to learn in other steps")


def teacher_shapes(
    teachers: Mapping[str, Teacher],
    objective: Objective,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: tuple[int, int],
) -> dict[str, TeacherShape]:
    """Sets the input normalisation of each teacher and measures its outputs for images of this size.

    Raises:
        InputError: as `check_asked`.
    """
    check_asked(teachers, objective)
    shapes = {}
    for name, teacher in teachers.items():
        teacher.set_input_stats(mean, std)
        shapes[name] = with_read(TeacherShape(teacher.levels(image_size)), teacher, objective, image_size)
    return shapes


def with_read(
    shape: TeacherShape, teacher: Teacher, objective: Objective, image_size: tuple[int, int]
) -> TeacherShape:
    """The shape with those of the teacher's logits and dense predictions for one image, where any term reads them."""
    read = with_boxes({reads(term) for term in objective.terms}, teacher.model)
    return TeacherShape(
        shape.levels,
        teacher.logits_shape(image_size) if "logits" in read else None,
        teacher.dense_shape(image_size) if "dense" in read else None,
        teacher.queries_shape(image_size) if "queries" in read else None,
        teacher.without_logits() if read - {"maps"} else "",
        teacher,
    )


def as_asked(distiller: Distiller, args: CanKDConfig) -> Distiller:
    """The same module, with the norms and the memory layout that the arguments ask for."""
    if args.sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
    allow_single_values(distiller, args)
    return channels_last(distiller, args.device) if args.channels_last else distiller


def input_stats(mean: Any, std: Any, processor: Any) -> tuple[list[float], list[float]]:
    """The student's mean and standard deviation: the arguments, or its image processor's, or ImageNet's."""
    if mean is None and processor is not None:
        mean, std = processor.image_mean, processor.image_std
    return list(mean or IMAGENET_MEAN), list(std or IMAGENET_STD)
