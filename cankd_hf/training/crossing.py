"""The way of a student's features into the head of its teacher, for `cross_head`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cankd_hf.config.distill import LossTerm
from cankd_hf.errors import InputError
from cankd_hf.losses.cross_head import TOWERS, CrossHeadLoss
from cankd_hf.models.cross_head import Features, Frame, TeacherHead, Towers, frame_of, layers_taken, tower_paths


class Crossing:
    """The way of a student's features into the head of a term's teacher. Not a module: the head is not trained.

    Args:
        term: with the loss.
        student: the student.
        teacher: the teacher's shapes, with the teacher itself.
        levels: channels of the student's maps.

    Raises:
        InputError: for a teacher without towers, a layer that there is not, or maps of several widths.
    """

    def __init__(self, term: LossTerm, student: Any, teacher: Any, levels: Iterable[int]) -> None:
        place = f"distill.terms.{term.label}"
        if not tower_paths(teacher.model):
            kind = type(teacher.model).__name__
            raise InputError(
                f"{place}.loss: {term.loss_name} runs through the head of a teacher that is a FPNForObjectDetection "
                f"with head retinanet, fcos or reppoints, got {kind}; use query_logits or a loss on maps"
            )
        asked = term.loss.layer if isinstance(term.loss, CrossHeadLoss) else term.options.get("layer")
        layer = layers_taken(student, teacher.model, asked)
        if layer is None:
            raise InputError(
                f"{place}.options.layer: expected a layer that the towers of both heads have, got {asked}; leave it "
                "out, or write 0 for the maps at the student's taps"
            )
        widths = sorted(set(levels)) if layer == 0 else [int(student.levels[0][0])]
        if len(widths) != 1:
            raise InputError(
                f"{place}.loss: expected maps of one width at the student's taps, got {widths} channels; name those "
                "of its neck in student.taps"
            )
        self.teacher, self.layer = teacher, layer
        self.head = TeacherHead(teacher.model, layer)
        self.channels = widths[0], self.head.width
        self.towers = Towers(student, layer) if layer else None
        self.features: Features = {}
        self.frame, self.size = Frame((1, 1), (1, 1)), (1, 1)

    def see(self, student: nn.Module, maps: list[Tensor], size: tuple[int, int]) -> None:
        """Takes the features of the student's last forward, on images of this size."""
        self.size = size
        if self.towers is None:
            self.features, self.frame = dict.fromkeys(TOWERS, maps), Frame(size, size)
        else:
            self.features, self.frame = self.towers.features, frame_of(student, size)

    def predict(self, loss: CrossHeadLoss) -> dict[str, Tensor] | None:
        """What the teacher's head makes of the features; None if the student's head did not run."""
        if not self.features:
            return None
        size = self.teacher.seen_size(self.size)
        placed = {name: self.head.place(maps, self.frame, size) for name, maps in self.features.items()}
        dtype = next(self.head.model.parameters()).dtype
        adapted = {name: [loss.adapted(name, x).to(dtype) for x in maps] for name, maps in placed.items()}
        return self.head(adapted, size)

    def remove(self) -> None:
        """Takes its hooks off the student."""
        if self.towers is not None:
            self.towers.remove()
