"""Sources of the teacher outputs for a batch: computed on the fly, or read from storage."""

import itertools
from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor
from torch.func import functional_call

from cankd_hf.data.common.batch import TEACHER_VIEW, Batch
from cankd_hf.teachers.teacher import Teacher, TeacherOutput


class TeacherSource(Protocol):
    """Turns a batch into one output for each named teacher."""

    def __call__(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, TeacherOutput]:
        """The outputs of the named teachers (None: all) for a batch, normalised with the student's statistics."""


class LiveTeachers:
    """A `TeacherSource` that runs the teachers on each batch."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        self.teachers = dict(teachers)

    def __call__(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, TeacherOutput]:
        """See `TeacherSource`."""
        wanted = self.teachers if names is None else names
        return {name: asked(self.teachers[name], batch.get(TEACHER_VIEW, batch["pixel_values"])) for name in wanted}


def asked(teacher: Teacher, images: Tensor) -> TeacherOutput:
    """The outputs of a teacher for images, on their device, wherever its weights are.

    One that is offloaded computes on the device of the images with a copy of its weights, which is dropped after it;
    one that is elsewhere computes there.
    """
    if not teacher.config.offload:
        return teacher(images.to(teacher.device)).to(images.device)  # type: ignore[no-any-return]
    resting = itertools.chain(teacher.named_parameters(), teacher.named_buffers())
    there = {name: tensor.to(images.device) for name, tensor in resting}
    return functional_call(teacher, there, (images,))  # type: ignore[no-any-return]
