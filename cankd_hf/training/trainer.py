"""`CanKDTrainer`: transformers.Trainer with a teacher beside it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from cankd_hf.config.data import DataConfig
from cankd_hf.config.distill import LossTerm
from cankd_hf.data.common.views import SeededDataset
from cankd_hf.errors import InputError
from cankd_hf.tasks import Task, task_for
from cankd_hf.teachers.load import load_teacher
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig, stepped_schedule
from cankd_hf.training.callbacks import EpochSetter, SafeStop
from cankd_hf.training.checkpoint import DISTILLER_FILE, MANIFEST_FILE, read_student_weights
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.hub_mixin import PushesStudent
from cankd_hf.training.monitoring.energy import EnergyMeter
from cankd_hf.training.monitoring.interval import BatchClock, PartMeans
from cankd_hf.training.monitoring.progress import show_progress
from cankd_hf.training.monitoring.trackers import group_names

logger = logging.getLogger(__name__)


class CanKDTrainer(PushesStudent):
    """Trains a small student with a big teacher's help: `loss = task_weight * task + sum of weighted feature losses`.

    A `transformers.Trainer` in everything else: resuming, accumulation, mixed precision, compiling, callbacks, Hub.
    Checkpoints hold the student in plain Hugging Face format, with connectors and losses in `distiller.safetensors`
    beside it; the teacher is never saved, wrapped or trained.

    Args:
        model: the student.
        teacher: the teacher, or its Hub id or folder; None trains the student alone.
        args: training arguments.
        terms: the weighted feature losses; None is CanKD with weight 10 (the paper's mu = 5) where there is a teacher.
        task_weight: multiplier of the student's own loss, >= 0; 0 needs no labels.
        student_taps: where to read the student's maps.
        grid: on which grid connectors compare maps, see `Connector`.
        task: what is learnt; found from the student's class where None.
        image_mean: mean of the student's input normalisation, per channel in 0..1.
        image_std: the same for its standard deviation.
        recipe: the resolved recipe as YAML, saved beside every checkpoint.
        kwargs: the rest of what `transformers.Trainer` takes.

    Raises:
        InputError: for what cannot work, before any training.
    """

    # Each part of the loss is a mean over the batch, so the Trainer must divide by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: str | Path | nn.Module | Teacher | None = None,
        args: CanKDConfig | None = None,
        *,
        terms: Sequence[LossTerm] | None = None,
        task_weight: float = 1.0,
        student_taps: str | list[str] = "auto",
        grid: str = "finer",
        task: Task | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        recipe: str | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else CanKDConfig("cankd_output")
        terms = _check_arguments(args, teacher, terms, task_weight)
        self.task = (task if task is not None else task_for(model)).for_model(model)
        self.recipe = recipe
        self.inherited: list[str] = []
        self.teacher = None if teacher is None else load_teacher(teacher)
        mean, std = _input_stats(image_mean, image_std, kwargs.get("processing_class"))
        if kwargs.get("processing_class") is None:
            # Saved beside the student: no pipeline knows otherwise how its images are normalised.
            kwargs["processing_class"] = self.task.image_processor(DataConfig(image_mean=mean, image_std=std))
        image_size = _image_size(args.seed, kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        teacher_levels = []
        if self.teacher is not None:
            self.teacher.set_input_stats(mean, std)
            teacher_levels = self.teacher.levels(image_size)
        # Fresh connectors must not depend on what was drawn before: they start equal for every way to get here.
        torch.manual_seed(args.seed)
        distiller = Distiller(model, terms, teacher_levels, image_size, student_taps, task_weight, grid)
        if args.sync_batchnorm:
            distiller = nn.SyncBatchNorm.convert_sync_batchnorm(distiller)
        if args.channels_last:
            distiller.to(memory_format=torch.channels_last)
        train_dataset = kwargs.get("train_dataset")
        if isinstance(train_dataset, Sized):
            kwargs["train_dataset"] = train_dataset = SeededDataset(train_dataset, args.seed)
        kwargs.setdefault("data_collator", self.task.collate)
        kwargs.setdefault("compute_metrics", lambda prediction: self.task.scores(prediction.predictions))
        super().__init__(model=distiller, args=args, **kwargs)
        # Older Trainers read this instead of `loss_is_scaled_for_ga`.
        self.model_accepts_loss_kwargs = False
        if self.teacher is not None:
            self.teacher.to(args.device)
            if args.channels_last:
                self.teacher.to(memory_format=torch.channels_last)
        group_names(self.callback_handler.callbacks)
        show_progress(self.callback_handler.callbacks, self.task.metric)
        self.energy = EnergyMeter()
        self.add_callback(self.energy)
        self.add_callback(SafeStop())
        if isinstance(train_dataset, SeededDataset):
            self.add_callback(EpochSetter(train_dataset))
        self._factors_now: tuple[list[float], Tensor | None] = ([], None)
        self._means = PartMeans()
        self._clock = BatchClock(args)

    @property
    def student(self) -> PreTrainedModel:
        """The model that is trained and saved."""
        return self._distiller.student

    @property
    def _distiller(self) -> Distiller:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

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
        factors = self._factors()
        batch = dict(inputs)
        if any(factors):
            # Autocast is the Trainer's, on; the teacher chooses its own precision.
            assert self.teacher is not None
            batch["teacher_maps"] = self.teacher(inputs["pixel_values"])
            if self._factors_now[0] != factors:
                # Copied to the device only when it changes: a copy in each step would make the host wait.
                self._factors_now = factors, torch.tensor(factors, device=self.args.device)
            batch["factors"] = self._factors_now[1]
            batch["measure"] = self._measures_now()
        outputs = model(**batch)
        if outputs["loss"] is None:
            # All factors are 0 and there is no task loss: nothing to learn in this step, but backward needs a graph.
            outputs["loss"] = sum(p.sum() * 0.0 for p in model.parameters() if p.requires_grad)
        self._means.add(outputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _factors(self) -> list[float]:
        if self.teacher is None:
            return []
        distiller = self._distiller
        return [
            term.factor(self.state.global_step, self.state.max_steps) if any(weights) else 0.0
            for term, weights in zip(distiller.terms, distiller.weights.values(), strict=True)
        ]

    def _measures_now(self) -> bool:
        """Whether this step ends in a log line: similarity is measured only there, to cost next to nothing."""
        if not self.args.measure_similarity:
            return False
        step = self.state.global_step + 1
        if self.args.logging_strategy == IntervalStrategy.STEPS:
            every = max(1, int(self.state.logging_steps))
            return step % every == 0 or step == self.state.max_steps or (step == 1 and self.args.logging_first_step)
        return step % 50 == 0 or step == self.state.max_steps

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Statistics of each image instead of logits, so that evaluation needs no memory for them."""
        inputs = self._prepare_inputs(inputs)
        batch = self.task.model_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if self.task.evaluates_features and self.teacher is not None:
                batch.update(teacher_maps=self.teacher(batch["pixel_values"]), measure=True)
            outputs = model(**batch)
        loss = None if outputs["loss"] is None else outputs["loss"].detach()
        if prediction_loss_only:
            return loss, None, None
        with torch.no_grad():
            statistics = self.task.statistics(outputs, inputs, self._distiller)
        # The Trainer computes metrics only where it sees labels; the statistics hold them already.
        return loss, statistics, statistics.new_zeros(len(statistics))

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means.drain(self._distiller, self.accelerator))
            logs.update(self._clock.drain(self.accelerator))
        super().log(logs, start_time)

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        if self.args.backbone_lr_scale != 1.0:
            self._scale_backbone(optimizer, self.model if model is None else model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler: Any = self.lr_scheduler  # type: ignore[has-type]
        if self.args.lr_drops and scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = stepped_schedule(optimizer, num_training_steps, self.args.lr_drops, warmup)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _scale_backbone(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Splits the backbone's parameters off into groups with their own learning rate."""
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

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self._distiller.state_dict() if state_dict is None else state_dict
        prefix = "student."
        student = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        self.student.save_pretrained(folder, state_dict=student)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.recipe is not None:
            (folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")
        self._save_facts(folder)
        if folder.name.startswith("checkpoint-"):
            rest = {name: value.contiguous() for name, value in state.items() if not name.startswith(prefix)}
            if rest:
                save_file(rest, folder / DISTILLER_FILE, metadata={"format": "pt"})
            if self.teacher is not None:
                (folder / MANIFEST_FILE).write_text(json.dumps(self.teacher.manifest(), indent=2), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        self._check_teacher(folder)
        state = {f"student.{name}": value for name, value in read_student_weights(folder).items()}
        if (folder / DISTILLER_FILE).is_file():
            state.update(load_file(folder / DISTILLER_FILE))
        result = self._distiller.load_state_dict(state, strict=False)
        tied = set(self.student.all_tied_weights_keys or ())
        missing = [key for key in result.missing_keys if key.removeprefix("student.") not in tied]
        if missing or result.unexpected_keys:
            raise InputError(
                f"{folder}: this checkpoint is of another student or other terms; "
                f"missing {missing[:5]}, unexpected {result.unexpected_keys[:5]}; "
                "resume with the recipe saved beside it"
            )

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        logger.info("Loading the best model: %s (%s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _check_teacher(self, folder: Path) -> None:
        """Another teacher halfway is another experiment: it is refused."""
        file = folder / MANIFEST_FILE
        now = None if self.teacher is None else json.loads(json.dumps(self.teacher.manifest()))
        then = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if now == then:
            return
        if now is None or then is None:
            raise InputError(f"{folder}: saved {'with' if then else 'without'} a teacher; resume it the same way")
        changed = [f"{key}: {then.get(key)!r} -> {now.get(key)!r}" for key in now if now.get(key) != then.get(key)]
        raise InputError(f"{folder}: saved with another teacher ({'; '.join(changed)}); resume with the same one")


def _check_arguments(
    args: CanKDConfig, teacher: Any, terms: Sequence[LossTerm] | None, task_weight: float
) -> list[LossTerm]:
    """Refuses what cannot train; returns the terms, with the default filled in."""
    if not isinstance(args, CanKDConfig):
        raise InputError(
            f"args: expected a cankd_hf.CanKDConfig, got {type(args).__name__}; it takes the same settings"
        )
    if args.n_gpu > 1:
        raise InputError(
            f"launch: {args.n_gpu} GPUs are visible to one process, which would train with DataParallel; "
            "use `accelerate launch -m cankd_hf.train ...` or make one GPU visible with CUDA_VISIBLE_DEVICES"
        )
    if teacher is None and terms:
        raise InputError("teacher: expected one for the given terms, got none; name one or leave the terms out")
    if terms is None:
        terms = [] if teacher is None else [LossTerm()]
    if task_weight == 0 and not terms:
        raise InputError("task_weight: 0 leaves nothing to train without a teacher and a term; give one of them")
    return list(terms)


def _image_size(seed: int, *datasets: Any) -> tuple[int, int]:
    """(height, width) of the first image found, or 224 x 224: only strides and channels are measured with it.

    Augmentation is drawn from the seed, so that a run that goes on measures, and pairs, as it did at first.
    """
    for dataset in datasets:
        if dataset is None or isinstance(dataset, dict):
            continue
        # Iterable data sets have a `__getitem__` too; it only raises.
        streamed = not isinstance(dataset, Sized)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sample = next(iter(dataset), None) if streamed else dataset[0]
        if sample is not None and "pixel_values" in sample:
            height, width = sample["pixel_values"].shape[-2:]
            return int(height), int(width)
    return 224, 224


def _input_stats(mean: Any, std: Any, processor: Any) -> tuple[list[float], list[float]]:
    """The student's input statistics: given, or its image processor's, or ImageNet's."""
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    if mean is None and processor is not None:
        mean, std = processor.image_mean, processor.image_std
    return list(mean or IMAGENET_DEFAULT_MEAN), list(std or IMAGENET_DEFAULT_STD)
