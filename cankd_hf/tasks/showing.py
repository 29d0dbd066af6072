"""What a task adds to the pictures and the report of a run: answers drawn on images, scores of single images, and a
confusion matrix. All of it is optional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel


class ImageScores(NamedTuple):
    """The score of each image, by which a report shows the worst first.

    Attributes:
        name: of the score, for headings, such as `mIoU of the image`.
        values: [N], in the order of the data set; nan for an image that has no score.
        greater_is_better: its direction.
        settings: further arguments of `Showing.answer`, with which answers look as they were scored.
    """

    name: str
    values: np.ndarray
    greater_is_better: bool = True
    settings: Mapping[str, Any] = {}


class Confusion(NamedTuple):
    """What was taken for what.

    Attributes:
        names: of the rows and columns; a last one beyond the classes, such as `background`, is possible.
        counts: int64 [R, R], the truth in rows, predictions in columns.
        unit: what is counted: `pixels`, `boxes`, `images`.
        note: a sentence on how it was counted; may be empty.
    """

    names: Sequence[str]
    counts: np.ndarray
    unit: str
    note: str = ""


class Showing:
    """Methods of `Task` for pictures and reports; a task with `pictured` has `answer`, `truth` and `paint`."""

    pictured: ClassVar[bool] = False
    picture_note: ClassVar[str] = ""  # a line above pictures of answers without further settings

    # Scores

    def image_scores(self, statistics: Any) -> ImageScores | None:
        """The score of each image, from the statistics of all, arrays [N, ...]; None for a task without one."""
        return None

    def tally(self, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> Tensor | None:
        """Counts of each image, [B, ...], that are kept only as their sum over all images, exact for any number of
        processes; for what is too large to be a statistic. Asked for in the scoring of a finished student alone.

        Args:
            outputs: of the `Distiller`, as `Task.statistics` gets them.
            inputs: of the batch.
        """
        return None

    def confusion(self, statistics: Any, tally: np.ndarray | None) -> Confusion | None:
        """The confusion matrix of a whole set; None for a task without one.

        Args:
            statistics: of all images, arrays [N, ...].
            tally: the sum of all `tally`, [...].
        """
        return None

    # Pictures

    def answer(self, model: PreTrainedModel, pixel_values: Tensor, **settings: Any) -> Any:
        """What a model, in eval mode, says of one image [3, H, W], normalised as the model expects it; on the CPU."""
        raise NotImplementedError

    def truth(self, sample: Mapping[str, Any]) -> Any:
        """The label of a sample in the form of `answer`."""
        raise NotImplementedError

    def paint(self, image: np.ndarray, answer: Any, truth: Any) -> np.ndarray:
        """A picture of an answer, or of the truth itself.

        Args:
            image: [H, W, 3] in 0..1, without normalisation.
            answer: to draw.
            truth: of the same image.

        Returns:
            uint8 [h, w, 3], of any size with the proportions of the image.
        """
        raise NotImplementedError

    def caption(self, answer: Any, truth: Any) -> str:
        """A line below the picture of an answer; empty where the picture says it all."""
        return ""

    def legend(self) -> list[tuple[str, Any]]:
        """Names and colours, as matplotlib reads them, of what `paint` draws."""
        return []
