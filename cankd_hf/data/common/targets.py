"""What a sample holds beside its image: the little that the parts shared by all tasks need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Summary:
    """What the checks keep of one target once its image is gone.

    Attributes:
        classes: the classes it holds; empty where the targets have none.
        noun: what a warning calls a sample of the set.
        dropped: the parts that were left out, and why.
        warnings: what should be known.
        doubtful: there is something about it that is wrong if many samples of the set have it.
        counted: it could have been doubtful.
        review: (names of the doubtful samples, number of the counted, class names) -> warnings; or raises.
    """

    classes: frozenset[int] = frozenset()
    noun: str = "image"
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    doubtful: bool = False
    counted: bool = True
    review: Callable[[Sequence[str], int, dict[int, str]], list[str]] | None = None


class Target(Protocol):
    """The label of one sample. A task with labels of another kind brings its own."""

    @property
    def value(self) -> Any:
        """What a transform gets beside the image."""

    def standing_in(self) -> Target:
        """The same in the place of a broken sample: it counts in no score."""

    def summary(self) -> Summary:
        """What the checks look at."""


@dataclass(frozen=True)
class Mask:
    """A label for every pixel.

    Attributes:
        value: [H, W], uint8 or int32, labels after reduction.
        ignore_index: label of void.
    """

    value: torch.Tensor
    ignore_index: int = 255

    def standing_in(self) -> Mask:
        """The same, all void: it counts in no score and in no loss."""
        return Mask(torch.full_like(self.value.int(), self.ignore_index), self.ignore_index)

    def summary(self) -> Summary:
        """Its labels; one of 0 and void alone may be a black-and-white foreground mask."""
        labels = frozenset(self.value.unique().tolist())
        return Summary(labels, "mask", doubtful=labels == {0, self.ignore_index}, review=self._review)

    def _review(self, doubtful: Sequence[str], counted: int, class_names: dict[int, str]) -> list[str]:
        if not doubtful or len(class_names) < 2:
            return []
        return [
            f"{len(doubtful)} masks hold only the labels 0 and {self.ignore_index} (void), first that of "
            f"{doubtful[0]}; if {self.ignore_index} means foreground there, they teach nothing: write class ids"
        ]
