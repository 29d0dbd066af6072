"""Run by torchrun from test_finite: what is not finite on one process is skipped, told and refused on both."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cankd_hf.config.teacher import TeacherConfig
from cankd_hf.errors import InputError
from cankd_hf.teachers.load import load_teacher
from tests.processes import leave_together
from tests.training.test_finite import Bad, breaking
from tests.training.tiny_trainers import Images, dinov2, trainer, weights


def refused(what: Any) -> str:
    """The message of an InputError."""
    try:
        what()
    except InputError as error:
        return str(error)
    return ""


folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
made = breaking(folder, {2} if rank == 1 else set(), max_steps=3)
made.train()
said = [f"skipped {made.guard.skipped}"]
save_file(weights(made), folder / f"skipped{rank}.safetensors")
said.append(refused(trainer(folder, Bad(16, {13}), max_steps=1).train))
said.append(refused(lambda: trainer(folder, eval_dataset=Bad(12, {9})).evaluate()))
drawn = trainer(folder, Images(16), teacher=TeacherConfig(config=dinov2()), max_steps=1)
said.append(drawn.teachers["teacher"].fingerprint)
drawn.train()
one = trainer(folder, Images(16), eval_dataset=Images(4))
if rank == 1:
    with torch.no_grad():
        next(one.student.parameters()).view(-1)[0] = float("nan")
said.append(refused(one.evaluate))
torch.manual_seed(rank)
said.append(refused(trainer(folder, teacher=load_teacher(TeacherConfig(config=dinov2()))).train))
(folder / f"said{rank}.txt").write_text("\n".join(said))
leave_together(folder, rank)
