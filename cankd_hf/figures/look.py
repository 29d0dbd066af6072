"""Runs one image through students and teachers: the maps that the figures are drawn from."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cankd_hf.features.taps import Taps
from cankd_hf.tasks.panels import evaluating
from cankd_hf.teachers.teacher import Teacher
from cankd_hf.training.distiller import Distiller
from cankd_hf.training.placing import Pair


@dataclass
class Subject:
    """One student to look at.

    Attributes:
        name: its title in figures, such as `student before`.
        taps: where the student's maps are read.
        distiller: connectors and losses of these weights; None: its maps are not compared with a teacher.
    """

    name: str
    taps: Taps
    distiller: Distiller | None = None


class SeenLoss(NamedTuple):
    """One loss on maps: name of its term, the pair it compares, and a copy of it on the CPU."""

    term: str
    pair: Pair
    loss: nn.Module


@dataclass
class Seen:
    """All maps of one image, float32 on the CPU.

    Attributes:
        name: of the image.
        image: [H, W, 3] in 0..1, as the student got it.
        size: height and width of the image before it was resized; pixel coordinates refer to it.
        students: name -> maps [C, h, w], fine to coarse.
        teachers: name -> maps [C, h, w]; empty without a teacher.
        connected: name -> pair -> student and teacher map of one shape [C, h, w], after the student's connector.
        losses: losses on maps of the last subject that has any.
    """

    name: str
    image: np.ndarray
    size: tuple[int, int]
    students: dict[str, list[Tensor]] = field(default_factory=dict)
    teachers: dict[str, list[Tensor]] = field(default_factory=dict)
    connected: dict[str, dict[Pair, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    losses: list[SeenLoss] = field(default_factory=list)

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of levels that were connected, by student level."""
        return sorted({pair for found in self.connected.values() for pair in found})

    def teacher_map(self, pair: Pair) -> Tensor:
        """The teacher's map of a pair."""
        return self.teachers[pair.of or next(iter(self.teachers))][pair.teacher]

    def stride(self, feature_map: Tensor) -> float:
        """Image pixels per cell of a map, geometric mean of both sides."""
        height, width = self.image.shape[:2]
        return sqrt(height * width / (feature_map.shape[-2] * feature_map.shape[-1]))


@torch.no_grad()
def look(
    name: str,
    pixel_values: Tensor,
    image: np.ndarray,
    subjects: Sequence[Subject],
    teachers: Mapping[str, Teacher] | Teacher | None = None,
    size: tuple[int, int] | None = None,
) -> Seen:
    """Runs one image through all models in eval mode; their modes, gradients and random state stay as they were.

    Args:
        name: of the image.
        pixel_values: [3, H, W], normalised with the student's statistics.
        image: the same image without normalisation, [H, W, 3] in 0..1.
        subjects: the students.
        teachers: one, or several by name, with `set_input_stats` called; None: nothing is compared.
        size: height and width of the image before it was resized; None: it was not resized.
    """
    seen = Seen(name, image, size or (image.shape[0], image.shape[1]))
    batch = pixel_values[None].float()
    for label, teacher in ({"teacher": teachers} if isinstance(teachers, Teacher) else teachers or {}).items():
        output = teacher(batch.to(teacher.input_scale.device))
        seen.teachers[label] = [found[0].float().cpu() for found in output.maps]
    for subject in subjects:
        with evaluating(subject.taps.model):
            device = next(subject.taps.model.parameters()).device
            maps = subject.taps.run(batch.to(device), **subject.taps.forward_kwargs)
        seen.students[subject.name] = [found[0].float().cpu() for found in maps]
        if subject.distiller is not None and seen.teachers:
            _connect(seen, subject.name, subject.distiller)
    return seen


def _connect(seen: Seen, name: str, distiller: Distiller) -> None:
    """Adds the maps after the connectors and copies of the losses, which figures compute with on the CPU."""
    if not distiller.pairs:  # all losses are on logits
        return
    ours = seen.students[name]
    found: dict[Pair, tuple[Tensor, Tensor]] = {}
    kinds = distiller.conditioned
    for label, pair in distiller.pairs.items():
        connector = copy.deepcopy(distiller.connectors[label]).cpu().float().eval()
        target, kind = seen.teacher_map(pair)[None], kinds[label][0]
        if kind and distiller.is_measured(kind):
            target = copy.deepcopy(distiller.conditioning[kind]).cpu()(target)
        student, teacher = connector(ours[pair.student][None], target)
        found[pair] = student[0], teacher[0]
    seen.connected[name] = found
    seen.losses = [
        SeenLoss(item.term.label, item.pair, copy.deepcopy(item.loss).cpu().float().eval())
        for item in distiller.placed
        if item.pair is not None
    ]
