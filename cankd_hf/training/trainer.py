"""`CanKDTrainer`: transformers.Trainer with teachers beside it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.data.common.batch import TEACHER_VIEW, Batch, BatchCollator
from cankd_hf.data.common.seeds import derived_seed, seeded
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.errors import InputError
from cankd_hf.tasks import Task, task_for
from cankd_hf.tasks.base import class_labels
from cankd_hf.teachers.load import TeacherLike, load_teacher
from cankd_hf.teachers.source import LiveTeachers, TeacherSource
from cankd_hf.training.cache_callback import CacheCallback
from cankd_hf.training.caching import CachingMixin
from cankd_hf.training.callbacks import EpochSetter, GracefulStopCallback
from cankd_hf.training.conditioning import ConditioningMixin
from cankd_hf.training.conflict_watch import ConflictCallback, hold_out
from cankd_hf.training.contention import BusyCoresCallback
from cankd_hf.training.evaluation import EvaluationMixin, TaskScores
from cankd_hf.training.finite import FiniteMixin
from cankd_hf.training.first_batch import FirstBatchMixin, FirstLook
from cankd_hf.training.hub_mixin import StudentHubMixin
from cankd_hf.training.loading import LoadingMixin
from cankd_hf.training.monitoring.energy import EnergyMeter
from cankd_hf.training.monitoring.interval import BatchClock, PartMeans
from cankd_hf.training.monitoring.kept import KeptClasses
from cankd_hf.training.monitoring.progress import show_progress
from cankd_hf.training.monitoring.trackers import group_names
from cankd_hf.training.objective import Objective
from cankd_hf.training.optimizing import OptimizerMixin
from cankd_hf.training.output import DistillerOutput
from cankd_hf.training.parallel import check_parallel
from cankd_hf.training.phases import PhasesMixin
from cankd_hf.training.placing import reads
from cankd_hf.training.pseudo import with_boxes
from cankd_hf.training.saving import CheckpointMixin
from cankd_hf.training.seeding import SeedMixin
from cankd_hf.training.setup import (
    as_asked,
    check_asked,
    check_objective,
    check_stock,
    input_stats,
    named_teachers,
    sorted_out,
    teacher_shapes,
    with_read,
)
from cankd_hf.training.sharding import ShardingMixin, check_sharded, is_sharded
from cankd_hf.training.streaming import StreamingMixin
from cankd_hf.training.trials import TrialsMixin
from cankd_hf.training.unlabelled import UnlabelledMixin
from cankd_hf.training.weighing import GRADIENT_SHARE
from cankd_hf.training.working import WorkingCallback

logger = logging.getLogger(__name__)

# Number of steps between measurements of similarity where logging is not by steps, and at least between those of the
# shares of the gradient, each of which goes backward through all losses.
MEASURE_EVERY = 50


class CanKDTrainer(
    SeedMixin,
    CachingMixin,
    ConditioningMixin,
    FiniteMixin,
    FirstBatchMixin,
    EvaluationMixin,
    UnlabelledMixin,
    LoadingMixin,
    OptimizerMixin,
    TrialsMixin,
    PhasesMixin,
    CheckpointMixin,
    ShardingMixin,
    StreamingMixin,
    StudentHubMixin,
):
    """Trains a student with one or several teachers: `task_weight * task loss + sum of weighted distillation losses`.

    Otherwise a `transformers.Trainer`: resuming, gradient accumulation, mixed precision, compiling, callbacks, Hub;
    docs/trainer.md goes through all its arguments.
    Checkpoints hold the student in plain Hugging Face format, with connectors and losses in `distiller.safetensors`
    beside it; teachers are never saved, wrapped or trained.

    Args:
        model: the student; None with a `model_init`.
        teacher: the teacher, or its Hub id or folder; None trains the student alone.
        args: training arguments, a `CanKDConfig` or plain `TrainingArguments`; may come second, without a teacher.
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
        others: further arguments of `transformers.Trainer` in its order, where `args` comes second.
        kwargs: further arguments of `transformers.Trainer`. Its `compute_loss_func` gets the student's output and
            takes the place of the task's loss.

    Raises:
        InputError: for arguments that cannot be used; raised before training.
    """

    _warned = False  # of a compute_loss that asks no teacher

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        teacher: TeacherLike | TrainingArguments | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
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
        one, args, kwargs = sorted_out(teacher, args, others, kwargs)
        given = named_teachers(one, teachers)
        self._objective = objective = check_objective(args, given, terms, task_weight, objective)
        check_parallel(args)
        check_stock(args, model, kwargs, objective.task_weight)
        self.args, model_init = args, kwargs.pop("model_init", None)
        model = self.first_student(model_init) if model is None else model
        self.task = (task if task is not None else task_for(model)).for_model(model)
        self.recipe = recipe
        self.inherited = list(inherited)
        head, seeds = self.task.teacher_head, {name: derived_seed(args.seed, name) for name in given}
        self.teachers = {name: load_teacher(one, seed=seeds[name], head=head) for name, one in given.items()}
        self.source: TeacherSource = LiveTeachers(self.teachers)
        mean, std = input_stats(image_mean, image_std, kwargs.get("processing_class"))
        if kwargs.get("processing_class") is None:
            # Saved with the student: pipelines read the image normalisation from it.
            kwargs["processing_class"] = self.task.image_processor(DataConfig(image_mean=mean, image_std=std))
        self.first = FirstLook(self.task, model, mean, std, kwargs.get("data_collator") is not None)
        image_size = self.first.at(kwargs, args, objective.task_weight)
        shapes = teacher_shapes(self.teachers, objective, mean, std, image_size)
        self._distiller_parts = shapes, image_size, student_taps, grid
        distiller = self.build_distiller(model)
        seen, self.held_out = hold_out(kwargs.get("train_dataset"), objective.guard, args.seed)
        kwargs["train_dataset"] = train_dataset = self.seeded_views(seen)
        kwargs["data_collator"] = collator = self._collator(kwargs.get("data_collator"), model)
        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = TaskScores(self.task)
        super().__init__(model=distiller, args=args, **kwargs)
        self.model_init = model_init
        # Older Trainers read this instead of `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = False
        check_sharded(self)
        self._prepare_unlabelled(collator, self.first.stride)
        self._check_shares()
        self.set_dispatch()
        self._place_teachers()
        self._add_callbacks(train_dataset)
        self._flops: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()
        self._factors_now: tuple[list[float], Tensor | None] = ([], None)
        self._means, self._kept = PartMeans(), KeptClasses()
        self._clock = BatchClock(args, train_dataset)

    def _collator(self, own: Any, model: PreTrainedModel) -> BatchCollator:
        return BatchCollator(own) if own else BatchCollator(self.task.collate, model.dtype, self.task.mix_labels)

    def _add_callbacks(self, train_dataset: Any) -> None:
        """Adds the callbacks of every run, and groups the names that trackers show."""
        group_names(self.callback_handler.callbacks)
        self.progress = show_progress(self.callback_handler.callbacks, self.task.metric)
        self.energy = EnergyMeter()
        self.add_callback(self.energy)
        self.graceful = GracefulStopCallback()
        self.add_callback(self.graceful)
        self.add_callback(BusyCoresCallback())
        self._watch()
        self.average_weights()
        self.working = WorkingCallback(self)
        if self.teachers:
            self.add_callback(self.working)
            self.add_callback(ConflictCallback(self))
        if self.caches:
            self.add_callback(CacheCallback(self))
        if isinstance(train_dataset, SeededDataset):
            self.add_callback(EpochSetter(train_dataset))

    def set_objective(self, objective: Objective) -> None:
        """Sets the objective of the next call of `train()`.

        Connectors and losses of terms in both objectives are kept, see `Distiller.set_objective`; optimizer and
        learning-rate schedule are created anew.
        """
        distiller = self.distiller
        if is_sharded(distiller) or self.deepspeed is not None:
            raise InputError("set_objective: FSDP or DeepSpeed holds the modules; make a new CanKDTrainer instead")
        check_asked(self.teachers, objective)
        self._objective = objective
        distiller.teachers = {
            name: with_read(shape, self.teachers[name], objective, distiller.image_size)
            for name, shape in distiller.teachers.items()
        }
        with seeded(self.args.seed):
            distiller.set_objective(objective)
        self._check_shares()
        self.model = self.model_wrapped = as_asked(distiller, self.args)
        self._place_teachers()
        self.optimizer = self.lr_scheduler = None

    def _check_shares(self) -> None:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        own_loss, weight = self.compute_loss_func is not None, self.distiller.objective.task_weight
        self.distiller.shares.check(sharded, own_loss)
        self.distiller.conflict.check(sharded, own_loss, weight)

    def _place_teachers(self) -> None:
        """Moves the teachers to the device, but for stored ones; those whose logits are read compute their head."""
        for name, teacher in self.teachers.items():
            terms = (item.term for item in self.distiller.placed if item.teacher == name)
            read = with_boxes({reads(term) for term in terms}, teacher.model)
            teacher.read(read, class_labels(self.distiller.student))
        self.use_stores()

    # Steps

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        self._clock.ask()
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._clock.got(batches)
        return batches, count

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if self.args.channels_last:
            for key in {"pixel_values", TEACHER_VIEW} & inputs.keys():
                inputs[key] = inputs[key].contiguous(memory_format=torch.channels_last)
        return inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in the Trainer, which looks at every module of the student for the same number in every step."""
        size = inputs["pixel_values"].numel() if "pixel_values" in inputs else 0
        known = self._flops.setdefault(self.distiller, {})  # a trial has a student of its own
        if size not in known:
            known[size] = super().floating_point_ops(inputs)
        return known[size]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = Batch(inputs)
        given = self._teaching(batch, model.training)
        inputs, labels = batch.inputs, None
        if self.compute_loss_func is not None:
            labels = given["targets"] = inputs.pop("labels", None)
        outputs = model(**inputs, **given, meta=batch.meta, keep=return_outputs or self.compute_loss_func is not None)
        if self.compute_loss_func is not None and self.distiller.objective.task_weight > 0:
            self._add_own_loss(outputs, labels, num_items_in_batch, model.training)
        if model.training:
            if outputs.loss is None:
                outputs["loss"] = self.distiller.nothing()
            self._means.add(outputs)
            self.guard.see_parts(outputs.get("parts"))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _teaching(self, batch: Batch, training: bool) -> dict[str, Any]:
        """Arguments of the `Distiller` for a step; none in evaluation, unless the task's scores need the teacher."""
        if training:
            step = self.state.global_step
            factors = self.distiller.objective.factors(step, self.state.max_steps)
            asked = {name: one.config.every for name, one in self.teachers.items() if step % one.config.every == 0}
            if len(asked) < len(self.teachers):
                factors = self.distiller.factors_of(factors, asked)
            rarest = max(asked.values(), default=1)
            given = self._ask_teachers(batch, factors, self._measures_now(rarest))
            if not given:
                return {}
            share = self._share_within(step + 1, rarest)
            return {**given, **self.distiller.measures(step // rarest), "share": share}
        if self.task.needs_teacher_in_evaluation:
            return self._ask_teachers(batch, [1.0] * len(self.distiller.objective.terms), True)
        return {}

    @property
    def loss_is_scaled_for_ga(self) -> bool:  # type: ignore[override]
        """Whether the loss is of the whole accumulated batch already, as it is with a `compute_loss_func`.

        Otherwise each part is a mean over its batch, and the Trainer divides by the number of accumulated batches.
        """
        return self.compute_loss_func is not None

    def _add_own_loss(
        self, outputs: DistillerOutput, labels: Any, num_items: Tensor | int | None, training: bool
    ) -> None:
        """Adds the `compute_loss_func` of the user to the distillation losses, as the task's loss."""
        task = self.compute_loss_func(outputs.outputs, labels, num_items_in_batch=num_items)  # type: ignore[misc]
        if self.args.average_tokens_across_devices and num_items is not None:
            task = task * self.accelerator.num_processes
        # The function's loss is of the whole accumulated batch; the others are means of one of its parts.
        parts = self.current_gradient_accumulation_steps if training else 1
        total = self.distiller.objective.task_weight * task
        outputs["loss"] = total if outputs.loss is None else total + outputs.loss / parts
        if outputs.parts is not None:
            outputs.parts["task"] = task.detach().float() * parts

    def _measures_now(self, rarest: int = 1) -> bool:
        """Whether similarity is measured in this step: only in the last ones before a log line, to save time.

        Args:
            rarest: steps from this one to the next that asks the teacher that is asked the least.
        """
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step and self.args.measure_similarity
        return first or self._line_within(step, rarest)

    def _line_within(self, step: int, steps: int = 1, apart: int = 1) -> bool:
        """Whether a log line with measurements comes at a step or at one of the next ones.

        Args:
            step: counted from 1.
            steps: how many, with that one.
            apart: least number of steps between two such lines.
        """
        if not self.args.measure_similarity:
            return False
        last = min(step + steps - 1, self.state.max_steps)
        by_steps = self.args.logging_strategy == IntervalStrategy.STEPS
        every = max(1, int(self.state.logging_steps)) if by_steps else MEASURE_EVERY
        every *= -(-apart // every)
        return last == self.state.max_steps or last // every > (step - 1) // every

    def _share_within(self, step: int, steps: int = 1) -> bool:
        """The same of a line that says how heavy each term is, where `forward` can have the gradients for it."""
        apart = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.compute_loss_func is not None
        again = (getattr(part, "gradient_checkpointing", False) for part in self.distiller.modules())
        if apart or not self._objective.task_weight or not self._line_within(step, steps, MEASURE_EVERY):
            return False
        return not self.args.torch_compile and not any(again)

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self._means.drain(self.accelerator)
            factors = self._objective.factors(self.state.global_step - 1, self.state.max_steps)
            if not means and any(factors):
                self._warn_of_own_loss()
            logs.update(means)
            self._kept.see(logs)
            logs.update(self._clock.drain(self.accelerator))
            logs.update({**self.distiller.shares.logged(), **self.distiller.conflict.logged()})
            shares = {name: value for name, value in means.items() if name.startswith(GRADIENT_SHARE)}
            if shares or self._share_within(self.state.global_step):
                over = (term.label for term, factor in zip(self._objective.terms, factors, strict=True) if not factor)
                logs.update({**{GRADIENT_SHARE + label: 0.0 for label in over}, **shares})
            self.guard.correct(logs)
        super().log(logs, start_time)

    def _warn_of_own_loss(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "compute_loss of %s asks no teacher, so nothing is distilled; add its loss to that of "
                "super().compute_loss(model, inputs, return_outputs=True)",
                type(self).__name__,
            )
