"""The label of a sample, as far as the code shared by all tasks needs to know it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Summary:
    """What the checks keep of one target after its image is freed."""

    classes: frozenset[int] = frozenset()  # the classes it holds; empty where the targets have none
    noun: str = "image"  # the word for a sample of the set in warnings
    dropped: tuple[str, ...] = ()  # the parts that were left out, and why
    warnings: tuple[str, ...] = ()  # notes about it
    doubtful: bool = False  # it has an oddity that is a fault if many samples of the set have it
    counted: bool = True  # it could have been doubtful
    # (names of the doubtful samples, number of the counted, class names) -> warnings; or raises
    review: Callable[[Sequence[str], int, dict[int, str]], list[str]] = lambda *_: []


class Target(Protocol):
    """The label of one sample. A task with labels of another kind brings its own."""

    @property
    def value(self) -> Any:
        """The argument of transforms beside the image."""

    def standing_in(self) -> Target:
        """The same in the place of a broken sample: it counts in no score."""

    def summary(self) -> Summary:
        """The input of the checks."""


@dataclass(frozen=True)
class Mask:
    """A label for every pixel: `value` [H, W], uint8 or int32, after reduction, with `ignore_index` as void."""

    value: torch.Tensor
    ignore_index: int = 255

    def standing_in(self) -> Mask:
        """The same, all void: it counts in no score and in no loss."""
        return Mask(torch.full_like(self.value.int(), self.ignore_index), self.ignore_index)

    def summary(self) -> Summary:
        """Its labels; doubtful with only 0 and void, which may be a black-and-white foreground mask."""
        labels = frozenset(self.value.unique().tolist())
        return Summary(labels, "mask", doubtful=labels == {0, self.ignore_index}, review=self._review)

    def _review(self, doubtful: Sequence[str], counted: int, class_names: dict[int, str]) -> list[str]:
        if not doubtful or len(class_names) < 2:
            return []
        return [
            f"{len(doubtful)} masks hold only the labels 0 and {self.ignore_index} (void), first that of "
            f"{doubtful[0]}; if {self.ignore_index} means foreground there, they teach nothing: write class ids"
        ]
