"""The interface of labels that is shared by all tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Summary:
    """Summary of a target for the checks, kept after its image is freed."""

    classes: frozenset[int] = frozenset()  # the classes it holds; empty where the targets have none
    noun: str = "image"  # the word for a sample in warnings
    dropped: tuple[str, ...] = ()  # parts of the label that were left out, and why
    empty: tuple[str, ...] = ()  # parts without content, which are always left out
    warnings: tuple[str, ...] = ()  # notes about the target
    doubtful: bool = False  # unusual in a way that is an error if many samples of the set are
    counted: bool = True  # the check for `doubtful` applies to it
    # (names of the doubtful samples, number of counted samples, class names) -> warnings; may raise InputError
    review: Callable[[Sequence[str], int, dict[int, str]], list[str]] = lambda *_: []


class Target(Protocol):
    """The label of one sample. A task with another kind of label implements its own."""

    @property
    def value(self) -> Any:
        """The label as passed to transforms, with the image."""

    def standing_in(self) -> Target:
        """A copy for a replacement of a broken sample, ignored in losses and scores."""

    def summary(self) -> Summary:
        """Summary for the checks."""


@dataclass(frozen=True)
class Mask:
    """A label for every pixel: `value` [H, W], uint8 or int32, after reduction, with `ignore_index` as void."""

    value: torch.Tensor
    ignore_index: int = 255

    def standing_in(self) -> Mask:
        """The same with all pixels void, ignored in losses and scores."""
        return Mask(torch.full_like(self.value.int(), self.ignore_index), self.ignore_index)

    def summary(self) -> Summary:
        """Its labels; doubtful with only 0 and void, which may be a black-and-white foreground mask."""
        labels = frozenset(self.value.unique().tolist())
        return Summary(
            labels, "mask", doubtful=labels == {0, self.ignore_index}, review=partial(_review, self.ignore_index)
        )


def _review(void: int, doubtful: Sequence[str], counted: int, class_names: dict[int, str]) -> list[str]:
    """A note on masks that may be black-and-white; no method, which would keep the pixels of each mask."""
    if not doubtful or len(class_names) < 2:
        return []
    return [
        f"{len(doubtful)} masks hold only the labels 0 and {void} (void), first that of {doubtful[0]}; if {void} "
        "means foreground there, they teach nothing: write class ids"
    ]


DOUBTFUL = (0.02, 1000.0)  # metres: medians outside of these are rather a wrong scale


@dataclass(frozen=True)
class DepthMap:
    """The label of one image: `value` [H, W], float32, in metres; 0 where the depth is not known."""

    value: torch.Tensor

    def standing_in(self) -> DepthMap:
        """The same without any depth, ignored in losses and scores."""
        return DepthMap(torch.zeros_like(self.value))

    def summary(self) -> Summary:
        """Doubtful with distances that no camera sees."""
        known = self.value[self.value > 0]
        middle = float(known.median()) if len(known) else 1.0
        return Summary(noun="depth map", doubtful=not DOUBTFUL[0] < middle < DOUBTFUL[1], review=_review_depth)


def _review_depth(doubtful: Sequence[str], counted: int, class_names: dict[int, str]) -> list[str]:
    """A note on depth maps in another unit."""
    if not doubtful:
        return []
    return [
        f"{len(doubtful)} depth maps have a median below {DOUBTFUL[0]:g} m or above {DOUBTFUL[1]:g} m, first that of "
        f"{doubtful[0]}; set data.depth.scale to what their numbers are divided by to be metres"
    ]


@dataclass(frozen=True)
class ClassId:
    """The label of one image as a whole: the number `value` of its class."""

    value: int

    def standing_in(self) -> ClassId:
        """No class, ignored in losses and scores."""
        return ClassId(NO_CLASS)

    def summary(self) -> Summary:
        """Its class."""
        return Summary(frozenset({self.value} - {NO_CLASS}))


NO_CLASS = -100  # what cross entropy leaves out
