"""The inheriting strategy: a student whose neck or head is initialised from its teacher's (CanKD, the dagger rows)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from cankd_hf.errors import InputError
from cankd_hf.models.torchvision_teachers import TorchvisionNet


@dataclass
class Inherited:
    """The tensors that one part (module path) of a student inherited, and those left, with the reasons."""

    part: str
    copied: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def count(self) -> str:
        """How many were copied: `14 of 16 tensors`."""
        return f"{len(self.copied)} of {len(self.copied) + len(self.left)} tensors"

    @property
    def mark(self) -> str:
        """The part as tables and cards name it: `neck`, or `neck (14 of 16 tensors)` where some were left."""
        return f"{self.part} ({self.count})" if self.left else self.part

    def __str__(self) -> str:
        left = f", not {', '.join(self.left[:5])}" + (" ..." if len(self.left) > 5 else "") if self.left else ""
        return f"{self.part}: {self.count} copied from the teacher{left}"


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, parts: Sequence[str]) -> list[Inherited]:
    """Copies parts (paths such as `neck` or `model.decoder`) of the teacher where name and shape of tensors agree.

    The student is changed in place; tensors that do not fit keep their initialisation. torchvision's models are mapped
    to our names. Raises InputError for a part that the student lacks, or of which nothing fits.
    """
    own = student.state_dict()
    given = teacher.state_as_ours() if isinstance(teacher, TorchvisionNet) else teacher.state_dict()
    report, problems = [], []
    for part in parts:
        names = [name for name in own if f"{name}.".startswith(f"{part}.")]
        if not names:
            top = sorted({name.split(".")[0] for name in own})
            problems.append(f"student.inherit: the student has no part {part!r}; it has {', '.join(top)}")
            continue
        found = Inherited(part)
        for name in names:
            if name not in given:
                found.left.append(f"{name} (the teacher has none)")
            elif own[name].shape != given[name].shape:
                found.left.append(f"{name} ({list(given[name].shape)} in the teacher, {list(own[name].shape)} here)")
            else:
                found.copied.append(name)
        if not found.copied:
            problems.append(f"student.inherit: nothing of {part!r} fits ({found}); give both models the same {part}")
        report.append(found)
    if problems:
        raise InputError(problems)
    for found in report:
        for name in found.copied:
            own[name].copy_(given[name])
    return report
