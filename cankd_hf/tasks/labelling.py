"""What a teacher's predictions become as labels of a data set: the part of `cankd label` that depends on the task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

VANISHED = 0.1  # of its prior: a class of which less is kept is warned of


@dataclass
class Prediction:
    """What a teacher says of one picture.

    Attributes:
        files: folder of the split -> content of a PNG file, such as `masks`.
        facts: plain data for the records, from which lines, statistics and pictures are made.
        confidence: mean, in 0..1; the lowest ones are shown first.
    """

    files: dict[str, bytes]
    facts: dict[str, Any]
    confidence: float


@dataclass
class Choices:
    """What the user chose.

    Attributes:
        threshold: for all classes; None leaves it to the task.
        thresholds: of classes by name.
        soft: whether probabilities are stored too.
        keep: of masks the least share of each class's pixels that is kept, of boxes the share of the expected number;
            None leaves it to the task.
    """

    threshold: float | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    soft: bool = False
    keep: float | None = None


@dataclass
class Summary:
    """The labels of a whole set.

    Attributes:
        thresholds: of each class.
        classes: a table, one row for each class by name.
        warnings: of classes that vanish.
        confidence: counts of what was predicted, in 20 bins of equal width over 0..1.
        unit: what is counted.
    """

    thresholds: list[float]
    classes: dict[str, dict[str, float | None]]
    warnings: list[str]
    confidence: list[int]
    unit: str


class Labelling(ABC):
    """How one task writes predictions as labels.

    Args:
        id2label: the teacher's classes, 0..K-1.
        choices: of the user.
        priors: what is known of labelled images, from `prior`; None without any.
        images: how many images `priors` are of.
    """

    beside: ClassVar[Mapping[str, str]]  # key of a line of the metadata -> folder of its file
    takes_soft: ClassVar[bool] = False  # `Choices.soft` means something
    palette: Mapping[int, Sequence[int]] | None = None  # colours of the labelled set

    def __init__(
        self, id2label: Mapping[int, str], choices: Choices, priors: np.ndarray | None = None, images: int = 0
    ) -> None:
        self.id2label, self.choices, self.priors, self.images = dict(id2label), choices, priors, images

    @property
    def looks_first(self) -> bool:
        """Whether thresholds depend on what the teacher says of some images, to be given to `look` beforehand."""
        return False

    def look(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> None:
        """Takes note of a batch of outputs, from which thresholds follow."""
        raise NotImplementedError

    def seen_so_far(self) -> Any:
        """What `look` noted, as plain data."""
        raise NotImplementedError

    def take(self, seen: Any) -> None:
        """Goes on from what `seen_so_far` gave."""
        raise NotImplementedError

    @property
    def settings(self) -> list[Any]:
        """What a prediction depends on of the choices."""
        return []

    @property
    def labels(self) -> dict[str, Any]:
        """The content of labels.json."""
        return {"num_labels": len(self.id2label), "id2label": {str(key): name for key, name in self.id2label.items()}}

    def threshold_of(self, label: int, default: float) -> float:
        """The user's threshold of a class, else `default`."""
        given = self.choices.threshold
        return self.choices.thresholds.get(self.id2label[label], default if given is None else given)

    @classmethod
    @abstractmethod
    def prior(cls, labels: Iterable[Any], classes: int) -> np.ndarray:
        """Amount of each class in labels of a data set, as its samples have them, [K]."""

    @abstractmethod
    def predict(self, outputs: Any, sizes: Sequence[tuple[int, int]], model_type: str) -> list[Prediction]:
        """Predictions of a batch without padding, at the height and width of each picture."""

    @abstractmethod
    def given(self, label: Any) -> Prediction:
        """A label of a labelled set, as it is written beside the teacher's."""

    @abstractmethod
    def summary(self, facts: Sequence[Mapping[str, Any]]) -> Summary:
        """Thresholds and statistics of all pictures."""

    def line(self, facts: Mapping[str, Any], size: tuple[int, int], number: int, summary: Summary) -> dict[str, Any]:
        """What a line of the metadata says beside its files."""
        return {}

    @abstractmethod
    def draw(self, image: Tensor, line: Mapping[str, Any], mask: Tensor | None) -> np.ndarray:
        """The picture [H, W, 3] uint8 with its label drawn, from its line in the metadata and its mask."""


def vanished(kept: Mapping[str, float], prior: Mapping[str, float], said: str) -> list[str]:
    """A warning for each class of which less than `VANISHED` of its prior is kept."""
    return [
        f"{name}: kept {kept[name]:.3g} of {said}, {kept[name] / prior[name]:.2f}x its prior {prior[name]:.3g}: a "
        f"student may forget it; lower its threshold (--threshold {name}=...), or label some by hand"
        for name in kept
        if prior[name] > 0 and kept[name] < VANISHED * prior[name]
    ]
