"""What all parts of `CanKDTrainer` share: the student, the teachers and their outputs for a batch."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import CallbackHandler

from cankd_hf.data.common.batch import Batch
from cankd_hf.errors import InputError
from cankd_hf.tasks import Task
from cankd_hf.teachers.mixing import mix_outputs
from cankd_hf.teachers.source import TeacherSource
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.arguments import CanKDConfig
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.handler import StudentCallbackHandler, unwrapped


class TeachingTrainer(Trainer):
    """A `transformers.Trainer` whose model is a `Distiller`, with teachers beside it."""

    args: CanKDConfig
    task: Task
    teachers: Mapping[str, Teacher]
    source: TeacherSource
    probe_dataset: Any = None  # labelled images of a run without labels, for its probe
    _factors_now: tuple[list[float], Tensor | None]

    @property
    def callback_handler(self) -> CallbackHandler:
        """Calls the callbacks, with the student as `model`."""
        return self._callback_handler

    @callback_handler.setter
    def callback_handler(self, handler: CallbackHandler) -> None:
        if type(handler) is CallbackHandler:  # one of the user's own is kept
            handler.__class__ = StudentCallbackHandler
        self._callback_handler = handler

    @property
    def student(self) -> PreTrainedModel:
        """The model that is trained and saved."""
        return self.distiller.student

    @property
    def distiller(self) -> Distiller:
        """Student, connectors and losses, without wrappers such as DDP."""
        return cast(Distiller, unwrapped(cast(nn.Module, self.model)))

    @property
    def teacher(self) -> Teacher | None:
        """The first teacher; None if the student trains alone."""
        return next(iter(self.teachers.values()), None)

    def taps_of(self, name: str) -> list[str]:
        """Names of a teacher's maps for messages, in their order: stages of a backbone, else taps."""
        taps, stages = [level.tap for level in self.distiller.teachers[name].levels], self.teachers[name].tap_names()
        return stages if len(stages) == len(taps) else taps

    def _ask_teachers(self, batch: Batch, factors: list[float], measure: bool) -> dict[str, Any]:
        """Arguments of the `Distiller` with the outputs of all teachers whose terms have a factor above 0."""
        names = self.distiller.teachers_of(factors)
        if not names:
            return {}
        if self._factors_now[0] != factors:
            # In the order of the device's work, which the host need not wait for.
            self._factors_now = factors, torch.tensor(factors).to(self.args.device, non_blocking=True)
        # Under the Trainer's autocast, which `Teacher.forward` disables: teachers have their own dtype.
        outputs = self.source(batch, names)
        if missing := [name for name in names if name not in outputs]:
            raise InputError(f"source: expected outputs of {', '.join(names)}, got none of {', '.join(missing)}")
        outputs = mix_outputs(outputs, batch.meta.get("mix"), batch["pixel_values"].shape[-2:])
        return {"teachers": outputs, "factors": self._factors_now[1], "measure": measure}

    def close_loaders(self) -> None:
        """Ends persistent loading processes; the next batches start new ones.

        When Python exits, torch waits five seconds for each that is left where memory is pinned (pytorch #81794).
        """
        for loader in self.accelerator._dataloaders:
            base = getattr(loader, "base_dataloader", loader)
            iterator, base._iterator = getattr(base, "_iterator", None), None
            if iterator is not None:
                iterator._shutdown_workers()
