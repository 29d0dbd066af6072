"""`CanKDTrainer`: transformers.Trainer with teachers beside it."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.data.common.batch import Batch, BatchCollator
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.errors import InputError
from cankd_hf.tasks import Task, task_for
from cankd_hf.teachers.load import TeacherLike, load_teacher
from cankd_hf.teachers.source import LiveTeachers, TeacherSource
from cankd_hf.training.arguments import CanKDConfig, stepped_schedule
from cankd_hf.training.callbacks import EpochSetter, GracefulStopCallback
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.evaluation import EvaluationMixin
from cankd_hf.training.first_batch import FirstBatchMixin, FirstLook
from cankd_hf.training.hub_mixin import StudentHubMixin
from cankd_hf.training.monitoring.energy import EnergyMeter
from cankd_hf.training.monitoring.interval import BatchClock, PartMeans
from cankd_hf.training.monitoring.progress import show_progress
from cankd_hf.training.monitoring.trackers import group_names
from cankd_hf.training.objective import Objective
from cankd_hf.training.saving import CheckpointMixin
from cankd_hf.training.setup import (
    as_asked,
    check_objective,
    input_stats,
    logits_shape,
    named_teachers,
    teacher_shapes,
)

# Number of steps between measurements of similarity where logging is not by steps.
MEASURE_EVERY = 50


class CanKDTrainer(FirstBatchMixin, EvaluationMixin, CheckpointMixin, StudentHubMixin):
    """Trains a student with one or several teachers: `task_weight * task loss + sum of weighted distillation losses`.

    Otherwise a `transformers.Trainer`: resuming, gradient accumulation, mixed precision, compiling, callbacks, Hub.
    Checkpoints hold the student in plain Hugging Face format, with connectors and losses in `distiller.safetensors`
    beside it; teachers are never saved, wrapped or trained.

    Args:
        model: the student.
        teacher: the teacher, or its Hub id or folder; None trains the student alone.
        args: training arguments.
        terms: the weighted distillation losses; by default, with one teacher, CanKD with weight 10 (the paper's
            mu = 5).
        task_weight: multiplier of the student's own loss, >= 0; 0 needs no labels.
        objective: terms, task weight and frozen parts in one object, instead of `terms` and `task_weight`.
        teachers: several teachers by name, instead of `teacher`.
        student_taps: the student's modules whose outputs are compared, see `Taps`.
        grid: grid on which maps are compared, see `Connector`.
        task: the student's task; by default that of its class.
        image_mean: mean of the student's input normalisation for each channel, for pixels in 0..1.
        image_std: standard deviation of the student's input normalisation for each channel.
        recipe: the resolved recipe as YAML, saved beside every checkpoint.
        inherited: parts of the student initialised from the teacher's weights, for the model card.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        InputError: for arguments that cannot be used; raised before training.
    """

    # Each part of the loss is a mean over the batch, so the Trainer must divide by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: TeacherLike | None = None,
        args: CanKDConfig | None = None,
        *,
        terms: Sequence[LossTerm] | None = None,
        task_weight: float = 1.0,
        objective: Objective | None = None,
        teachers: Mapping[str, TeacherLike] | None = None,
        student_taps: str | list[str] = "auto",
        grid: str = "finer",
        task: Task | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        recipe: str | None = None,
        inherited: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else CanKDConfig("cankd_output")
        given = named_teachers(teacher, teachers)
        objective = check_objective(args, given, terms, task_weight, objective)
        self.task = (task if task is not None else task_for(model)).for_model(model)
        self.recipe = recipe
        self.inherited = list(inherited)
        self.teachers = {name: load_teacher(one) for name, one in given.items()}
        self.source: TeacherSource = LiveTeachers(self.teachers)
        mean, std = input_stats(image_mean, image_std, kwargs.get("processing_class"))
        if kwargs.get("processing_class") is None:
            # Saved with the student: pipelines read the image normalisation from it.
            kwargs["processing_class"] = self.task.image_processor(DataConfig(image_mean=mean, image_std=std))
        self.first = FirstLook(self.task, model, mean, std, kwargs.get("data_collator") is not None)
        image_size = self.first.at(kwargs, args, objective.task_weight)
        shapes = teacher_shapes(self.teachers, objective, mean, std, image_size)
        # New connectors get the same initial weights whatever random numbers were drawn before.
        torch.manual_seed(args.seed)
        distiller = as_asked(Distiller(model, objective, shapes, image_size, student_taps, grid), args)
        train_dataset = kwargs.get("train_dataset")
        if isinstance(train_dataset, Sized):
            kwargs["train_dataset"] = train_dataset = SeededDataset(train_dataset, args.seed)
        kwargs["data_collator"] = BatchCollator(kwargs.get("data_collator") or self.task.collate)
        kwargs.setdefault("compute_metrics", lambda prediction: self.task.scores(prediction.predictions))
        super().__init__(model=distiller, args=args, **kwargs)
        # Older Trainers read this instead of `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = False
        self._place_teachers()
        group_names(self.callback_handler.callbacks)
        show_progress(self.callback_handler.callbacks, self.task.metric)
        self.energy = EnergyMeter()
        self.add_callback(self.energy)
        self.graceful = GracefulStopCallback()
        self.add_callback(self.graceful)
        if isinstance(train_dataset, SeededDataset):
            self.add_callback(EpochSetter(train_dataset))
        self._factors_now: tuple[list[float], Tensor | None] = ([], None)
        self._means = PartMeans()
        self._clock = BatchClock(args)

    def set_objective(self, objective: Objective) -> None:
        """Sets the objective of the next call of `train()`.

        Connectors and losses of terms in both objectives are kept, see `Distiller.set_objective`; optimizer and
        learning-rate schedule are created anew.
        """
        distiller = self.distiller
        distiller.teachers = {
            name: replace(shape, logits=logits_shape(self.teachers[name], objective, distiller.image_size))
            for name, shape in distiller.teachers.items()
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            distiller.set_objective(objective)
        self.model = self.model_wrapped = as_asked(distiller, self.args)
        self._place_teachers()
        self.optimizer = self.lr_scheduler = None

    def _place_teachers(self) -> None:
        """Moves the teachers to the device; those whose logits are read compute their head too."""
        for name, teacher in self.teachers.items():
            teacher.to(self.args.device)
            if self.args.channels_last:
                teacher.to(memory_format=torch.channels_last)
            teacher.reads_logits = any(item.teacher == name and item.pair is None for item in self.distiller.placed)

    # Steps

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self._clock.ask()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._clock.got(batches)
        return batches, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.args.channels_last:
            inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = Batch(inputs)
        factors = self.distiller.objective.factors(self.state.global_step, self.state.max_steps)
        given = self._ask_teachers(batch, factors, self._measures_now())
        outputs = model(**batch.inputs, **given)
        if outputs.loss is None:
            # All factors are 0 and there is no task loss: the loss is 0, but backward needs a graph.
            outputs["loss"] = sum(p.sum() * 0.0 for p in model.parameters() if p.requires_grad)
        self._means.add(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _measures_now(self) -> bool:
        """Whether similarity is measured in this step: only in steps that end with a log line, to save time."""
        if not self.args.measure_similarity:
            return False
        step = self.state.global_step + 1
        if self.args.logging_strategy == IntervalStrategy.STEPS:
            every = max(1, int(self.state.logging_steps))
            return step % every == 0 or step == self.state.max_steps or (step == 1 and self.args.logging_first_step)
        return step % MEASURE_EVERY == 0 or step == self.state.max_steps

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means.drain(self.accelerator))
            logs.update(self._clock.drain(self.accelerator))
        super().log(logs, start_time)

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.args.backbone_lr_scale != 1.0:
            self._scale_backbone(optimizer, self.distiller if model is None else model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.args.lr_drops and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            given = self.optimizer if optimizer is None else optimizer
            assert given is not None
            self.lr_scheduler = stepped_schedule(given, num_training_steps, self.args.lr_drops, warmup)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _scale_backbone(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Moves the backbone's parameters into groups with their own learning rate."""
        # At the top of our own students, inside `model` in the native detectors.
        backbone = {id(p) for name, p in model.named_parameters() if ".backbone." in f".{name}"}
        if not backbone:
            raise InputError("training.backbone_lr_scale: the student has no module called `backbone`; leave it at 1")
        for group in list(optimizer.param_groups):
            inside = [p for p in group["params"] if id(p) in backbone]
            if inside:
                group["params"] = [p for p in group["params"] if id(p) not in backbone]
                lr = group["lr"] * self.args.backbone_lr_scale
                optimizer.add_param_group({**group, "params": inside, "lr": lr})
