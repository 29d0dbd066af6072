"""Student, connectors and losses in one module: everything that is trained, and where loss weights are applied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.features.connectors import Connector
from cankd_hf.features.grids import logits_of
from cankd_hf.features.taps import Level, Taps
from cankd_hf.teachers.teacher import TeacherOutput
from cankd_hf.training.conflict import Conflict
from cankd_hf.training.connecting import Place
from cankd_hf.training.objective import Objective
from cankd_hf.training.output import DistillerOutput
from cankd_hf.training.placing import (
    TeacherShape,
    as_teachers,
    check_label,
    conditionings,
    freeze,
    frozen_part,
    make_loss,
    pairs_of,
)
from cankd_hf.training.predicting import PredictingModule, asked_of_student
from cankd_hf.training.pseudo import run_student
from cankd_hf.training.shares import Shares
from cankd_hf.training.weighing import WeighingModule


class Distiller(WeighingModule, PredictingModule):
    """The student and all modules trained with it: a connector per pair of levels, a loss per term and pair.

    `loss = task_weight * task + sum over terms and pairs of weight * factor * value`, where `value` is the unweighted
    distillation loss. Teachers are not part of it (a submodule would be switched back to training mode, saved and
    wrapped); their outputs come in as `teachers`.

    Args:
        student: the model to train; its output has `loss` (if it has a task) and `logits`.
        objective: what is minimised; a list of terms means task weight 1. The loss of a term is a name in `LOSSES`;
            or a class, built as `cls(size, **options)` if it derives from `DistillationLoss` (`size`: channels of
            the maps or number of classes), else as `cls(**options)`; or a module, copied for each further pair.
        teachers: shapes of each teacher's outputs, by name; a list of levels means a single teacher.
        image_size: (height, width) of the images with which the student's levels are measured.
        taps: the student's modules whose outputs are compared, see `Taps`.
        grid: grid on which two maps are compared, see `Connector`.

    Raises:
        InputError: unknown loss or teacher, bad options, levels that cannot be paired, different numbers of classes.
    """

    # Read by transformers.Trainer.
    accepts_loss_kwargs = False
    main_input_name = "pixel_values"
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective | Sequence[LossTerm] = (),
        teachers: Mapping[str, TeacherShape] | Sequence[Level] = (),
        image_size: tuple[int, int] = (224, 224),
        taps: str | list[str] = "auto",
        grid: str = "finer",
    ) -> None:
        super().__init__()
        self.student = student
        self.teachers = as_teachers(teachers)
        self.connectors = nn.ModuleDict()
        self.losses = nn.ModuleDict()
        self.conditioning, self.shares, self.conflict = nn.ModuleDict(), Shares(()), Conflict(())
        self._places: list[Place] = []
        self.crossings = {}
        self.taps: Taps | None = None
        self.levels: list[Level] = []
        self._settings = image_size, taps, grid
        self._thawed: list[nn.Parameter] = []
        self._frozen: list[str] = []
        self.counted_labels: Callable[[Any], tuple[Any, Tensor | None]] | None = (
            None  # of the task, set by the trainer
        )
        self.set_objective(objective if isinstance(objective, Objective) else Objective(terms=objective))

    def forget(self) -> None:
        """Drops connectors, losses and statistics, so that the next objective makes all of them anew."""
        self.connectors, self.losses, self._places = nn.ModuleDict(), nn.ModuleDict(), []
        self.conditioning, self.shares = nn.ModuleDict(), Shares(())

    def set_objective(self, objective: Objective) -> None:
        """Replaces the objective.

        Connectors and losses of terms that are in both objectives, with the same options and pairs, are kept; those
        of new terms are newly initialised; all others are dropped.

        Raises:
            InputError: as for the class, or if all that could be trained is frozen.
        """
        image_size, taps, _ = self._settings
        if objective.terms and self.taps is None:
            self.taps = Taps(self.student, taps)
            self.levels = self.taps.levels(image_size)
        places, connectors, losses = self._place(objective.terms)
        self._frozen = [frozen_part(self.student, part) for part in objective.frozen]
        self._thawed = freeze(self.student, objective.frozen, self._thawed)
        self.objective, self._places = objective, places
        self.connectors, self.losses = nn.ModuleDict(connectors), nn.ModuleDict(losses)
        self.shares = Shares(objective.terms, self.shares).to(self.device)
        self.conflict = Conflict(objective.terms, objective.guard, self.conflict).to(self.device)
        self.conditioning = conditionings(self.placed, self.teachers, self.conditioning, self.device)
        self.train(self.training)
        if objective.frozen and not any(parameter.requires_grad for parameter in self.parameters()):
            raise InputError("frozen: expected something left to train, got all of the student; leave one part out")

    def _place(self, terms: Sequence[LossTerm]) -> tuple[list[Place], dict[str, nn.Module], dict[str, nn.ModuleList]]:
        """All terms at all their pairs, with connectors and losses: existing modules if they match, else new ones."""
        image_size, _, grid = self._settings
        known = {(item.term.structure, item.pair): item.loss for item in self.placed}
        places: list[Place] = []
        connectors: dict[str, nn.Module] = {}
        losses: dict[str, nn.ModuleList] = {}
        self.forget_crossings()
        given: set[int] = set()  # losses that were given as modules and are in use
        for term in terms:
            check_label(term)
            name = self._teacher_of(term)
            teacher, modules = self.teachers[name], nn.ModuleList()
            pairs = pairs_of(term, self.levels, teacher, name if len(self.teachers) > 1 else "")
            further: dict[str, Any] = {}
            for pair in pairs:
                if pair is None:
                    width, further = self._read_predictions(term, name)
                else:
                    student_level, teacher_level = self.levels[pair.student], teacher.levels[pair.teacher]
                    width = teacher_level.channels
                    # One connector per pair, shared by all terms that compare this pair.
                    if pair.name in self.connectors:
                        connectors[pair.name] = self.connectors[pair.name]
                    elif pair.name not in connectors:
                        made = Connector(student_level, teacher_level, grid, always=len(self.teachers) > 1)
                        connectors[pair.name] = made.to(self.device)
                loss = known.get((term.structure, pair))
                modules.append(
                    loss
                    if loss is not None
                    else make_loss(term, width, id(term.loss) in given, further).to(self.device)
                )
                given.add(id(term.loss))
            losses[term.label] = modules
            places += [(term, name, *rest) for rest in zip(pairs, term.weights(len(pairs)), strict=True)]
        return places, connectors, losses

    def teachers_of(self, factors: Sequence[float]) -> list[str]:
        """The teachers that the terms with a factor above 0 learn from."""
        factor_of = {term.label: factor for term, factor in zip(self.objective.terms, factors, strict=True)}
        return list(dict.fromkeys(item.teacher for item in self.placed if factor_of[item.term.label] > 0))

    def factors_of(self, factors: Sequence[float], teachers: Collection[str]) -> list[float]:
        """The factors, with 0 for the terms of all other teachers."""
        teacher_of = {item.term.label: item.teacher for item in self.placed}
        pairs = zip(self.objective.terms, factors, strict=True)
        return [factor if teacher_of.get(term.label) in teachers else 0.0 for term, factor in pairs]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) at which levels are measured."""
        return self._settings[0]

    @property
    def coarsest_stride(self) -> int:
        """The coarsest stride among the maps that are compared, in whole pixels; 0 without maps."""
        strides = [self.levels[pair.student].stride for pair in self.pairs.values()]
        strides += [
            self.teachers[pair.of or next(iter(self.teachers))].levels[pair.teacher].stride
            for pair in self.pairs.values()
        ]
        return round(max(strides, default=0))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # Frozen and the same everywhere: DDP would send them around in each step.
        return [f"conditioning.{name}" for name, _ in self.conditioning.named_buffers()]

    def _teacher_of(self, term: LossTerm) -> str:
        if term.teacher is None and len(self.teachers) == 1:
            return next(iter(self.teachers))
        if term.teacher in self.teachers:
            return str(term.teacher)
        place = f"distill.terms.{term.label}.teacher"
        if not self.teachers:
            raise InputError(f"{place}: the term needs a teacher, and there is none; give one, or leave the term out")
        known = ", ".join(self.teachers)
        raise InputError(f"{place}: expected one of {known}, got {term.teacher}; name the teacher to learn from")

    def train(self, mode: bool = True) -> Distiller:
        """As `nn.Module.train`; frozen parts stay in eval mode."""
        super().train(mode)
        for part in self._frozen:  # by name: SyncBatchNorm and wrappers take the place of modules
            self.student.get_submodule(part).eval()
        return self

    # Attributes that transformers.Trainer reads from a model, taken from the student.

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.student.dtype

    @property
    def name_or_path(self) -> str:
        return str(self.student.name_or_path)

    @property
    def _no_split_modules(self) -> list[str]:
        # FSDP shards modules of these classes one by one. Not the losses: they are measured outside their `forward`.
        present = {type(module).__name__ for module in self.student.modules()}
        return sorted(present & set(self.student._no_split_modules or []))

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.student.is_activation_checkpointing

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        name = "activation_checkpointing_enable"
        enable = getattr(self.student, name, None) or self.student.gradient_checkpointing_enable
        try:
            enable(*args, **kwargs)
        except ValueError as error:
            raise InputError(
                f"training.activation_checkpointing: {error} Set it to false for this student."
            ) from error

    # What transformers 5.19 and 5.20 call both, the newest that Python 3.10 can have.
    gradient_checkpointing_enable = activation_checkpointing_enable

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.student.is_gradient_checkpointing

    def num_parameters(self, *args: Any, **kwargs: Any) -> int:
        return self.student.num_parameters(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module | None:
        try:
            return self.student.get_input_embeddings()
        except NotImplementedError:  # of most detectors; accelerate asks under FSDP2, and takes None for an answer
            return None

    # What callbacks do with a model: the student is saved, as if it were trained alone.

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """`save_pretrained` of the student; `state_dict` may be the student's or that of this module."""
        if state_dict is not None and any(name.startswith("student.") for name in state_dict):
            own = {name: value for name, value in state_dict.items() if name.startswith("student.")}
            state_dict = {name.removeprefix("student."): value for name, value in own.items()}
        self.student.save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """`push_to_hub` of the student."""
        return self.student.push_to_hub(*args, **kwargs)

    def add_model_tags(self, tags: list[str] | str) -> None:
        self.student.add_model_tags(tags)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Any = None,
        teachers: Mapping[str, TeacherOutput] | None = None,
        factors: Tensor | None = None,
        measure: bool = False,
        meta: Any = None,
        keep: bool = True,
        targets: Any = None,
        weigh: bool = False,
        watch: str = "",
        share: bool = False,
        **inputs: Any,
    ) -> DistillerOutput:
        """One batch through the student and, when teacher outputs come with it, through the losses.

        Args:
            pixel_values: images normalised with the student's statistics, [B, 3, H, W].
            labels: the student's labels; ignored if the task weight is 0.
            teachers: the teachers' outputs for the same images; terms of other teachers are skipped.
            factors: schedule factor of each term, [number of terms], in 0..1; None means 1.
            measure: also measure raw similarity and branch share (no gradient).
            meta: metadata of the samples, see `Batch`; not passed to the student.
            keep: return the student's output with its gradient; without it only the loss holds on to the graph.
            targets: labels for the losses that read them, where the student gets none. (The Trainer takes every
                argument with `label` in its name for one that batches must have.)
            weigh: set the weights of the terms with a share anew.
            watch: measure whether the terms fight the task, on a batch that is `trained` or `held` out; "" does not.
            share: also measure how heavy each term is beside the task, by their gradients at the student's maps.
            inputs: further inputs of the student.
        """
        counted = None
        if labels is not None and self.objective.task_weight > 0:
            inputs["labels"], counted = (labels, None) if self.counted_labels is None else self.counted_labels(labels)
        if self.taps is not None:
            inputs = {**self.taps.forward_kwargs, **inputs}
        inputs |= asked_of_student(self.student, teachers, self.placed)
        outputs = run_student(self.student, {"pixel_values": pixel_values, **inputs}, self.placed, teachers)
        logits = logits_of(outputs)
        result: dict[str, Any] = {}
        total, parts = self._task(outputs.loss if "labels" in inputs else None, counted, pixel_values)
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        maps = self._maps(size if teachers else None)
        if teachers:
            connected = self.connect(maps, teachers, (meta or {}).get("seen"))
            answers = self.answers(outputs, targets if labels is None else labels, meta, maps, size)
            values = list(self.values(connected, answers, teachers))
            parts |= {item.name: value.detach().float() for item, value in values}
            task, total = total, self._sum(total, values, factors, maps, weigh, watch)
            if measure:
                result = self.measured(maps, teachers, connected, answers)
            if share and maps:
                result["reports"] = {**result.get("reports", {}), **self.measured_shares(task, values, factors, maps)}
        if total is None and not keep and self.training and torch.is_grad_enabled():
            total = self.nothing()
        if logits is not None and not keep:
            logits = logits.detach()
        return DistillerOutput(loss=total, logits=logits, parts=parts, outputs=outputs if keep else None, **result)

    def _maps(self, size: tuple[int, int] | None) -> list[Tensor]:
        """The student's maps for images of a size; with None, where nothing reads them, none are kept."""
        if self.taps is None:
            return []
        if size is not None:
            return self.taps.collect(size)
        self.taps.clear()
        return []

    def nothing(self) -> Tensor:
        """A loss of 0 [] for a step in which no loss counts; made within `forward`, where DDP and FSDP see it."""
        parts = [getattr(p, "to_local", lambda p=p: p)() for p in self.parameters() if p.requires_grad]
        return torch.stack([part.sum() for part in parts]).sum() * 0.0
